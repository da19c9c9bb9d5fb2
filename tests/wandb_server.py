"""A stand-in for the W&B service, on this machine: as much of its protocol as wandb needs to begin, write, resume and
finish a run, and the ways in which a service fails."""

import base64
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

KEY = "x" * 40


class Service(ThreadingHTTPServer):
    """Listens at `url`. From the first request that contains `at` it fails: it hangs (`fault="hang"`), breaks off
    (`reset`), is gone (`vanish`) or answers a status (500)."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fault: str | int | None = None
        self.at = ""
        self.buckets: dict[str, dict[str, Any]] = {}
        """Of each run, by its id: what it was begun with."""
        self.lines: dict[str, dict[str, dict[int, str]]] = {}
        """Of each run the lines of each of its files, by their number."""
        self.complete: set[str] = set()
        self.files: dict[str, list[str]] = {}
        """Of each run, by its id, the files that it has sent."""
        self.artefacts: list[dict[str, Any]] = []
        self.alerts: list[tuple[str, str, str]] = []
        """Of each the run's id, title and text."""
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The history of a run, in the order of its lines."""
        lines = self.lines.get(run, {}).get("wandb-history.jsonl", {})
        return [json.loads(lines[number]) for number in sorted(lines)]

    def summary(self, run: str) -> dict[str, Any]:
        lines = self.lines.get(run, {}).get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}

    def vanish(self) -> None:
        """Refuses every connection from now on, and ends those there are."""
        self.fault = "reset"
        self.shutdown()
        self.server_close()
        for connection in self._connections:
            _reset(connection)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            new = variables.get("name") not in self.buckets
            known = self.buckets.setdefault(variables["name"], {})
            known.update({key: value for key, value in variables.items() if value is not None})
            return {"upsertBucket": {"bucket": self._bucket(variables["name"]), "inserted": new}}
        if "RunResumeStatus" in query:
            return {"model": {**_project(variables), "bucket": self._bucket(variables["name"])}}
        if "createRunFiles" in query:
            self.files.setdefault(variables["run"], []).extend(variables["files"])
            files = [{"name": name, "uploadUrl": f"{self.url}/files/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append((variables["runName"], variables["title"], variables["text"]))
            return {"notifyScriptableRunAlert": {"success": True}}
        if "CreateArtifact (" in query:
            asked = variables["input"]
            aliases = sorted(alias["alias"] for alias in asked.get("aliases") or [])
            name, kind = asked["artifactCollectionName"], asked["artifactTypeName"]
            self.artefacts.append({"run": asked["runName"], "name": name, "type": kind, "aliases": aliases})
            number = str(len(self.artefacts) - 1)
            return {"createArtifact": {"artifact": {"id": number, "state": "PENDING", "artifactSequence": {}}}}
        if "createArtifactManifest" in query or "updateArtifactManifest" in query:
            file = {"id": "f", "uploadUrl": f"{self.url}/files/manifest", "uploadHeaders": []}
            (name,) = {"createArtifactManifest", "updateArtifactManifest"} & set(query.replace("(", " ").split())
            return {name: {"artifactManifest": {"id": "m", "file": file}}}
        if "createArtifactFiles" in query:
            specs = variables["input"]["artifactFiles"]
            for spec in specs:
                self.artefacts[int(spec["artifactID"])].setdefault("files", []).append(spec["name"])
            nodes = [
                {
                    "storagePath": spec["name"],
                    "uploadUrl": f"{self.url}/files/{quote(spec['name'])}",
                    "uploadHeaders": [],
                    "artifact": {"id": spec["artifactID"]},
                }
                for spec in specs
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        if "commitArtifact" in query:
            self.artefacts[int(variables["artifactID"])]["committed"] = True
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "d"}}}
        if "query ArtifactByID" in query:
            return {"artifact": _artefact(self.artefacts[int(variables["id"])], variables["id"])}
        if "query ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        if "viewer" in query:
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _bucket(self, run: str) -> dict[str, Any] | None:
        known = self.buckets.get(run)
        if known is None:
            return None
        files = {"historyLineCount": "wandb-history.jsonl", "eventsLineCount": "wandb-events.jsonl"}
        lines = {name: self.lines.get(run, {}).get(file, {}) for name, file in files.items()}
        tails = {name.replace("LineCount", "Tail"): [each[max(each)]] if each else [] for name, each in lines.items()}
        return {
            "id": run,
            "name": run,
            "displayName": known.get("displayName", run),
            "config": known.get("config", "{}"),
            "summaryMetrics": json.dumps(self.summary(run)),
            "tags": known.get("tags", []),
            "notes": known.get("notes"),
            "logLineCount": 0,
            "wandbConfig": json.dumps({"t": 1}),  # it has begun
            "project": _project(known),
            **{name: len(each) for name, each in lines.items()},
            **{name: json.dumps(tail) for name, tail in tails.items()},
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.at in f"{self.path} {body.decode(errors='ignore')}":
            self.server.at = ""
        fault = None if self.server.at else self.server.fault
        if fault == "hang":
            time.sleep(600)
        if fault == "vanish":
            self.server.vanish()
        if fault in ("reset", "vanish"):
            return _reset(self.connection)
        if isinstance(fault, int):
            return self._reply(fault, {"error": "as the test asked"})
        if self.command == "PUT":
            return self._reply(200, {})
        if self.headers.get("Authorization") != "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode():
            return self._reply(401, {"error": "invalid API key"})
        if self.path == "/graphql":
            asked = json.loads(body)
            return self._reply(200, {"data": self.server.answer(asked["query"], asked.get("variables") or {})})
        if self.path.endswith("/file_stream"):
            run, sent = self.path.split("/")[-2], json.loads(body)
            for name, file in (sent.get("files") or {}).items():
                lines = self.server.lines.setdefault(run, {}).setdefault(name, {})
                lines.update(enumerate(file["content"], file["offset"]))
            if sent.get("complete"):
                self.server.complete.add(run)
            return self._reply(200, {"limits": {}})
        self._reply(404, {})

    def do_GET(self) -> None:
        self.do_POST()

    do_PUT = do_GET

    def _reply(self, status: int, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def _project(variables: dict[str, Any]) -> dict[str, Any]:
    entity = variables.get("entity") or "me"
    return {"id": "p", "name": variables["project"], "entity": {"id": entity, "name": entity}}


def _artefact(known: dict[str, Any], number: str) -> dict[str, Any]:
    return {
        "__typename": "Artifact",
        "id": number,
        "artifactSequence": {"__typename": "ArtifactSequence", "name": known["name"], "project": None},
        "artifactType": {"name": known["type"]},
        "state": "COMMITTED",
        "digest": "d",
        "createdAt": "2026-01-01T00:00:00",
        "tags": [],
        "ttlIsInherited": True,
        **dict.fromkeys(("versionIndex", "ttlDurationSeconds", "size", "fileCount"), 0),
        **dict.fromkeys(("description", "metadata", "historyStep", "commitHash", "updatedAt", "aliases")),
    }


def _reset(connection: socket.socket) -> None:
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:
        pass
