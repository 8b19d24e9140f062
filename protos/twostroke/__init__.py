"""The client of Twostroke, an LLM inference service with separate prefill and decode workers."""

from twostroke.async_client import AsyncClient
from twostroke.chat import ChatOptions, Message, Messages, Tool
from twostroke.client import Client
from twostroke.errors import (
    DeadlineExceeded,
    InvalidArgument,
    Overloaded,
    TwostrokeError,
    Unauthenticated,
    Unavailable,
)
from twostroke.request import Options, Prompt
from twostroke.results import Choice, Finish, FinishReason, Generation, Piece, ToolCall

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "ChatOptions",
    "Choice",
    "Client",
    "DeadlineExceeded",
    "Finish",
    "FinishReason",
    "Generation",
    "InvalidArgument",
    "Message",
    "Messages",
    "Options",
    "Overloaded",
    "Piece",
    "Prompt",
    "Tool",
    "ToolCall",
    "TwostrokeError",
    "Unauthenticated",
    "Unavailable",
]
