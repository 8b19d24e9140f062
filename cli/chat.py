"""`twostroke chat`: a conversation in the terminal."""

import time
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module

from rich.console import Console

from cli.options import Connection, Sampling, errors_as_exit, sentence_of
from cli.room import fit
from twostroke import Client, InvalidArgument, Message, Piece, TwostrokeError


def chat(*, system: str | None = None, connection: Connection = Connection(), sampling: Sampling = Sampling()) -> None:
    """
    Parameters
    ----------
    system
        A system message to begin with.
    """
    with suppress(ImportError):  # not on Windows
        import_module("readline")  # gives input() line editing and history
    console = Console(highlight=False)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    with errors_as_exit(), connection.client() as client:
        console.print(f"[dim]{client.model().name}; Ctrl-C cuts an answer short, Ctrl-D ends[/]")
        while (question := _read_question()) is not None:
            if not question.strip():
                continue
            messages.append({"role": "user", "content": question})
            answer, messages = _answer(client, messages, sampling, console)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _read_question() -> str | None:
    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()


def _answer(
    client: Client, messages: list[Message], sampling: Sampling, console: Console
) -> tuple[str | None, list[Message]]:
    """Prints the answer as it comes. Returns what came of it, None if there is nothing to go on with; and the messages
    that it answers, without the oldest turns if the context is full."""
    options = sampling.options()
    options["parsed"] = True
    try:
        try:
            return _print(client.stream_chat(messages, **options), "cut off by --max-tokens", console), messages
        except InvalidArgument:
            if (fitting := fit(client, messages, sampling)) is None:
                raise
        cut = "cut off by --max-tokens"
        if (left_out := len(messages) - len(fitting.messages)) > 0:
            console.print(f"[dim]the context is full: the oldest {left_out} messages are left out from here on[/]")
        if fitting.max_tokens < sampling.most_tokens:
            cut = "cut off where the context is full"
        options["max_tokens"] = fitting.max_tokens
        return _print(client.stream_chat(fitting.messages, **options), cut, console), fitting.messages
    except TwostrokeError as error:
        _print_error(error, console)
        return None, messages


def _print(pieces: Iterable[Piece], cut_off: str, console: Console) -> str | None:
    """Prints pieces as they come, and returns the text. Raises InvalidArgument, which comes before any text; prints
    other errors."""
    text, tokens, began, first, cut, thinking = "", 0, time.monotonic(), None, "", False
    try:
        for piece in pieces:
            if piece.token_ids and first is None:
                first = time.monotonic()
            tokens += len(piece.token_ids)
            text += piece.text
            if piece.finish and piece.finish.reason == "length":
                cut = f", {cut_off}"
            if piece.reasoning_content:
                console.out(piece.reasoning_content, style="dim", end="", highlight=False)
                thinking = True
            if piece.text and thinking:
                print("\n")
                thinking = False
            print(piece.text, end="", flush=True)
            for call in piece.tool_calls:  # a model may make some up
                console.out(f"{call.name}({call.arguments})", style="dim", highlight=False)
    except KeyboardInterrupt:
        print(" …", end="")
    except InvalidArgument:
        raise
    except TwostrokeError as error:
        _print_error(error, console)
        return text or None
    print()
    if first is not None and tokens > 1:
        rate = (tokens - 1) / max(time.monotonic() - first, 1e-9)
        milliseconds = (first - began) * 1000
        console.print(f"[dim]{tokens} tokens{cut}, the first after {milliseconds:.0f} ms, then {rate:.0f} tokens/s[/]")
    return text or None


def _print_error(error: TwostrokeError, console: Console) -> None:
    console.print(f"\n[red]{error.code.name}:[/] ", end="")
    console.print(sentence_of(error), markup=False)
