"""The configuration: what a person types, what each setting may be, and what it is called elsewhere."""

from pathlib import Path

CONF = Path(__file__).resolve().parents[3] / "conf"
