"""Requests, and their way to workers."""
