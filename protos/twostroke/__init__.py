"""The client of Twostroke, an LLM inference service with separate prefill and decode workers."""

__version__ = "0.1.0"
