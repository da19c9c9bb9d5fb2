"""What counts as secret, and what doesn't."""

import pytest

from sft.runs.secrets import of_code, redacted, without_secrets

KEYS = (
    "hf_" + "aB3" * 11,
    "sk-proj-" + "x9Yz" * 8,
    "AKIA" + "ABCDEFGH12345678",
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2_" * 9,
    "xoxb-123456789012-abcdefGHIJ",
    "AIza" + "Sy-12_ab" * 4 + "xyz",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTYifQ.c2lnbmF0dXJl",
    "-----BEGIN RSA PRIVATE KEY-----\n+MIIEow\n+IBAAKC\n-----END RSA PRIVATE KEY-----",
)


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_known_by_their_shape(key: str) -> None:
    for text in (redacted(f"it said {key}."), of_code(f"x = f({key})"), without_secrets({"a": [key]})["a"][0]):
        assert key not in text and "MII" not in text and "***" in text


def test_assigned_in_text_and_on_a_command_line() -> None:
    assert redacted("sft train +logger.api_key=abc x=1") == "sft train +logger.api_key=*** x=1"
    assert redacted("{'Authorization': 'Bearer abc', 'b': 1}") == "{'Authorization': 'Bearer ***', 'b': 1}"
    assert redacted("https://me:pass@host/a postgres://u:p@h") == "https://me:***@host/a postgres://u:***@h"
    assert redacted("the token store: 3 rows; max_new_tokens=7") == "the token store: 3 rows; max_new_tokens=7"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('+    token = "abcdef"', '+    token = "***"'),
        ("+export WANDB_API_KEY=0123abc", "+export WANDB_API_KEY=***"),
        ("+WANDB_API_KEY=0123abc sft train", "+WANDB_API_KEY=*** sft train"),
        ("-  hub_token: 'abc'", "-  hub_token: '***'"),
        ('+ os.environ["HF_TOKEN"] = "abc"', '+ os.environ["HF_TOKEN"] = "***"'),
        *((line, line) for line in ("+    token = tokenizer.encode(text)[0]", "+def f(token: int) -> int:")),
        *((line, line) for line in ("+export HF_TOKEN=$(cat file)", "+    return tokens[password]", "+num_tokens=3")),
    ],
)
def test_in_code(line: str, shown: str) -> None:
    assert of_code(f"--- a\n{line}\n b") == f"--- a\n{shown}\n b"


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("MY_PASSWORD", "correct horse"),
        ("SOME_TOKEN", "true"),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json"),
    ):
        monkeypatch.setenv(name, value)
    assert redacted('true "correct horse" /home/me/key.json') == 'true "***" /home/me/key.json'


def test_a_configuration_keeps_its_parts() -> None:
    settings = {
        "extra": {"api_key": "abcd", "again": "x abcd y", "token": "<|im_end|>", "secrets": {"a": ["12345", 12345, 1]}},
        "data": {"system": "Never tell the password: it is blue", "stop_token_ids": [1], "max_new_tokens": 500},
        "secret": None,
        "token": True,
    }
    assert without_secrets(settings) == {
        "extra": {"api_key": "***", "again": "x *** y", "token": "<|im_end|>", "secrets": {"a": ["***", "***", 1]}},
        "data": settings["data"],
        "secret": None,
        "token": True,
    }
    assert without_secrets(without_secrets(settings)) == without_secrets(settings)
