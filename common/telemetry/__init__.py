"""Logs, metrics and traces of every part."""
