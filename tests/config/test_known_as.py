"""The page of names from elsewhere is that table, and what the table says to set exists."""

import re

from pages import DOCS
from sft.cli import COMMANDS
from sft.config.arguments import groups, names
from sft.config.known_as import KNOWN_AS, known_as, tables


def test_the_page_is_the_table() -> None:
    (page,) = (path for path in DOCS if path.name == "known-as.md")
    assert page.read_text().endswith(tables() + "\n")


def test_what_it_says_to_set_exists() -> None:
    known = {*names("train"), *groups()}
    options = {option for found in groups().values() for option in found}
    for here in (here for table in KNOWN_AS.values() for here in table.values()):
        for words in re.findall("`([^`]+)`", here):
            command, *settings = words.split() if words.startswith("sft ") else ["", words]
            assert not command or settings.pop(0) in COMMANDS, words
            for setting in settings:
                name, _, value = setting.partition("=")
                assert name in (
                    *known,
                    *options,
                    "-m",
                    "hydra/sweeper",
                    "checkpoint",
                    "max_new_tokens",
                ) or name.startswith(("lightning.", "hf", "upload")), words
                assert name not in groups() or not value or value in options, words


def test_a_name_is_known_by_where_it_stands() -> None:
    assert known_as("trainer.max_steps") == "max_steps"
    assert known_as("strategy.config.optimizer") == "optimizer, a file of conf/optimizer/"
    assert known_as("data.batch_size") == "micro_batch_size and global_batch_size"
    assert known_as("xyzzy") is None
