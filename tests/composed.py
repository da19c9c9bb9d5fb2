"""Composes the default configuration once, for all processes that are forked from the server that imports this."""

from sft.training import recipe

recipe._default()
