"""Tokens to answers: text, reasoning, tool calls."""
