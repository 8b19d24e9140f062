"""Grammars that answers must follow."""
