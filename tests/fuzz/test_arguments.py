"""Any command line → settings, or one line for the user."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from sft.config import arguments
from sft.config.check import check
from sft.config.known_as import known_as
from sft.config.schema import COMMANDS, Name
from sft.errors import UserError
from sft.mistakes import one_line, unknown
from sft.runs.plain import plain
from sft.runs.run import Run

from .drawn import fuzz, texts, values

NAMES = sorted(
    {name for command in ("train", "export") for name in arguments.names(command)} | arguments.groups().keys()
)
signs = st.lists(
    st.sampled_from(
        (*"[]{},:='\"\\$~+-*/.#%;()@ \n\t", "${", "${oc.env:HOME}", "1e-4", "null", "true", "a", "é", "\u202e")
    ),
    max_size=6,
).map("".join)
names = st.sampled_from(NAMES) | texts | st.builds("{}.{}".format, st.sampled_from(NAMES), texts)
words = (
    st.builds("{}{}={}".format, st.sampled_from(("", "", "", "+", "++", "~", "--", "-")), names, signs | texts)
    | st.sampled_from(
        ("-m", "--cfg", "--cfg=job", "-p", "--config-dir", "--config-name=x", "--prompt", "-h", "--", "-")
    )
    | signs
    | texts
)


@pytest.mark.parametrize("command", sorted({*COMMANDS, "train", "generate", "compare", "runs"}))
def test_any_argument_is_a_setting_or_said_in_a_line(command: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()

    @given(st.lists(words, max_size=3))
    def any_arguments(line: list[str]) -> None:
        try:
            typed = arguments.parse(command, line)
            for setting in typed.settings:
                parser.parse_override(setting)
        except (UserError, HydraException, RuntimeError) as error:
            said = one_line(error, command)
            assert said and ("\n" not in said or "\n" in shlex.join(line)), (line, said)

    fuzz(any_arguments, 15)


def test_a_text_without_hydra_s_own_signs_reaches_it_unchanged() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    plain = st.text(
        st.characters(exclude_categories=("Cs", "Cc", "Z"), exclude_characters="\\\"'${}[](),~"), max_size=9
    )

    @given(
        st.sampled_from(("name", "model.chat_template", "data.path")),
        plain | st.from_regex(r"[0-9._e+:-]{1,6}", fullmatch=True),
    )
    def any_text(name: str, value: str) -> None:
        (setting,) = arguments.parse("train", [f"{name}={value}"]).settings
        meant = parser.parse_override(setting).value()
        assert (meant == value and isinstance(meant, str)) or value.lower() == "null"

    fuzz(any_text)


def test_any_configuration_is_checked_in_a_line() -> None:
    trees = st.dictionaries(
        st.sampled_from([name for name in NAMES if "." not in name]) | texts,
        values
        | st.dictionaries(st.sampled_from([name.rpartition(".")[2] for name in NAMES]) | texts, values, max_size=3),
        max_size=4,
    )

    @given(trees, st.sampled_from(sorted(COMMANDS)))
    def any_configuration(config: dict[str, Any], command: str) -> None:
        try:
            check(config, command)
        except UserError as error:
            line = one_line(error, command)
            if not line:
                raise

    fuzz(any_configuration)


def test_a_name_is_refused_or_is_that_of_a_folder_of_runs_dir(tmp_path: Path) -> None:
    legal = TypeAdapter(Name)

    @given(texts | signs | st.text(max_size=200) | st.sampled_from(("../a", "a/b", "x" * 300, "a;b", "é", "\u202ea")))
    def any_run(name: str) -> None:
        try:
            legal.validate_python(name)
        except ValidationError:
            return
        run = Run.named({"run": name, "runs_dir": str(tmp_path)})
        assert run.folder.parent == tmp_path
        run.folder.mkdir(exist_ok=True)
        assert run.folder.resolve() == tmp_path / name and not set(name) & set("/%\n")
        assert plain(name) == name

    fuzz(any_run)


def test_any_name_that_is_unknown_has_a_line() -> None:
    @given(names, st.sampled_from(sorted(COMMANDS)))
    def any_name(name: str, command: str) -> None:
        known_as(name)
        assert unknown(name, command).startswith("there is no setting")

    fuzz(any_name)
