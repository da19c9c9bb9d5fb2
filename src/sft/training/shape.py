"""data=auto → the shape that the first rows have, before the run is named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from sft.config.literal import escaped, instantiate
from sft.data.conversation import Row
from sft.data.files import Source
from sft.data.shape import NUM_ROWS, chat_in_text, find
from sft.data.shapes import SHAPES, check_columns
from sft.errors import UserError
from sft.runs import config_file
from sft.runs.identity import UNREAD
from sft.runs.manifest import Damaged
from sft.training.settings import check_hub

_unsaid: list[str] = []  # lines of the last `settle_data`


def settle_data(config: DictConfig) -> None:
    """Puts the shape that the first rows have in the place of data=auto; a run that exists keeps what its config.yaml
    records. `UserError` where no shape fits, or more than one, and for columns that the rows lack.

    Reads the beginning of each source alone, so every rank finds the same, in a moment.
    """
    _unsaid[:] = _settle(config)


def said() -> list[str]:
    """The lines on what the last `settle_data` took the rows for, once: whoever reads the data says them."""
    lines = list(_unsaid)
    _unsaid.clear()
    return lines


def _settle(config: DictConfig) -> list[str]:
    from sft.data.rows import first_rows, local_files

    asked: Any = OmegaConf.to_container(config.data.conversation, resolve=True)
    function = asked.pop("_target_")
    asked.pop("_partial_", None)
    is_auto = function == UNREAD
    if not config.data.path or not (is_auto or function in {shape.target for shape in SHAPES.values()}):
        return []
    if is_auto and (recorded := _recorded(config, asked)):
        with open_dict(config):
            config.data.conversation, config.data.supervise = escaped(recorded)
        return []
    training, validation = instantiate(config.data, _convert_="all").sources()
    rows: dict[Source, list[Row]] = {}
    lines: list[str] = []
    for source in (*training, *validation):
        try:
            is_hub = local_files(source) is None
        except UserError:
            return []  # `check_inputs` says so, if the run needs them
        if is_hub and not is_auto:
            continue
        if is_hub:
            check_hub([("data.path", source.path)])
        rows[source] = list(first_rows(source, NUM_ROWS, cache_dir=Path(config.data.cache_dir)))
    if is_auto:
        found = {source: find(str(source), rows[source], asked) for source in training}
        (where, (shape, _)), *others = found.items()
        for other, (its, _) in others:
            if its.typed() != shape.typed():
                raise UserError(
                    f"the sources have more than one shape: {where} has {shape.typed()}, and {other} {its.typed()}: "
                    "give them one shape, or train on one of them"
                )
        function, asked = SHAPES[shape.name].target, shape.arguments
        with open_dict(config):
            config.data.conversation = escaped({"_target_": function, "_partial_": True, **asked})
            if shape.name == "text":
                config.data.supervise = "all"
        lines += [line for _, line in found.values()]
    for where, first in rows.items():
        check_columns(str(where), first, function, asked)
        mark = chat_in_text(first, str(asked["column"])) if function == SHAPES["text"].target else None
        if mark:
            lines.append(
                f"note: {where}: the text holds a chat ({mark}), and every token of it is learned, the user's too: "
                "rows of messages (data=messages) would train the responses only"
            )
    return lines


def _recorded(config: DictConfig, asked: Mapping[str, object]) -> tuple[object, str] | None:
    """The conversation and `supervise` of the run that `run=NAME` names, if it exists and reads rows as asked."""
    file = Path(config.runs_dir) / str(config.run) / "config.yaml"
    if not OmegaConf.select(config, "run") or not file.is_file():
        return None
    try:
        data: Any = config_file.read(file.parent).get("data", {})
    except Damaged:
        return None
    recorded = data.get("conversation", {})
    set_here = {key: value for key, value in asked.items() if value is not None and (key, value) != ("chat", True)}
    if any(recorded.get(key) != value for key, value in set_here.items()):
        return None
    return recorded, data["supervise"]
