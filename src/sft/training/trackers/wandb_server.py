"""W&B's server: which key it is given, and whether it can be used. Nothing here waits longer than it says."""

import json
import os
from base64 import b64encode
from contextlib import suppress
from http.client import HTTPException
from ssl import SSLCertVerificationError
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from sft.runs.signals import shielded
from sft.training.trackers.waiting import line, within

ANSWER = 3.0  # seconds for which the server may hold up a run until it answers at all


def settings() -> Any:
    """wandb's settings, from its files and the environment. It prints nothing from now on, and never asks for a key."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports wait 20 s at exit for a server that hangs
    import wandb

    with shielded():
        return wandb.setup(wandb.Settings(silent=True)).settings


def find_key(settings: Any) -> str | None:
    """The key or the token's file that wandb would use: of the environment, the netrc file or its settings."""
    if found := os.environ.get("WANDB_API_KEY") or settings.identity_token_file:
        return str(found)
    try:
        from wandb.sdk.lib import wbauth
    except ImportError:  # older
        from wandb.sdk.lib import apikey  # type: ignore[attr-defined]

        return apikey.api_key(settings)
    return wbauth.read_netrc_auth(host=settings.base_url) or settings.api_key


def fault(settings: Any, key: str | None) -> str | None:
    """Why W&B's server can't be used, where that is certain: wandb itself would retry for minutes."""

    def ask_in_time() -> str | None:
        return ask(settings, key, "{ viewer { id } }")

    return within(ANSWER, ask_in_time, f"{settings.base_url} doesn't answer")


def ask(settings: Any, key: str | None, query: str, variables: dict[str, object] | None = None) -> str | None:
    """Sends one query or mutation; why it can't be answered, where that is certain."""
    proxies = {scheme: proxy for scheme in ("http", "https") if (proxy := getattr(settings, f"{scheme}_proxy", None))}
    headers = {"Content-Type": "application/json", "User-Agent": "wandb"}
    if key != settings.identity_token_file:
        headers["Authorization"] = "Basic " + b64encode(f"api:{key}".encode()).decode()
    body = json.dumps({"query": query, "variables": variables or {}}).encode()
    try:
        asked = Request(f"{settings.base_url}/graphql", body, headers)
        build_opener(ProxyHandler(proxies or None)).open(asked, timeout=ANSWER).close()
    except HTTPError as error:
        if error.code == 401 and "Authorization" in headers:
            return f"{settings.base_url} refuses the key: run `wandb login --relogin`"
    except (OSError, HTTPException) as error:
        if not isinstance(getattr(error, "reason", None), SSLCertVerificationError):  # wandb may know the certificate
            return f"{settings.base_url} can't be reached: {line(error)}"
    return None


def leave() -> None:
    """Ends wandb's own process, for as long as it takes to answer."""

    def teardown() -> None:
        import wandb

        with suppress(Exception, SystemExit):
            wandb.teardown()

    within(ANSWER, teardown, None)
