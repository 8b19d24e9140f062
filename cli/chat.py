"""`twostroke chat`: a conversation in the terminal."""

import time
from contextlib import suppress
from importlib import import_module

from rich.console import Console

from cli.options import Connection, Sampling
from twostroke import Client, Message, TwostrokeError


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
    with connection.client() as client:
        try:
            console.print(f"[dim]{client.model().name}; Ctrl-C cuts an answer short, Ctrl-D ends[/]")
        except TwostrokeError as error:
            raise SystemExit(f"twostroke: {error.code.name}: {error.message}") from error
        while (question := _read_question()) is not None:
            if not question.strip():
                continue
            messages.append({"role": "user", "content": question})
            answer = _answer(client, messages, sampling, console)
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


def _answer(client: Client, messages: list[Message], sampling: Sampling, console: Console) -> str | None:
    """Prints the answer while it comes, and returns as much of it as came; None where there is none to go on with."""
    text, tokens, began, first, cut = "", 0, time.monotonic(), None, ""
    try:
        for piece in client.stream_chat(messages, **sampling.options()):
            if piece.token_ids and first is None:
                first = time.monotonic()
            tokens += len(piece.token_ids)
            text += piece.text
            if piece.finish and piece.finish.reason == "length":
                cut = ", cut off by --max-tokens"
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        print(" …", end="")
    except TwostrokeError as error:
        console.print(f"\n[red]{error.code.name}:[/] ", end="")
        console.print(error.message, markup=False)
        return text or None
    print()
    if first is not None and tokens > 1:
        rate = (tokens - 1) / max(time.monotonic() - first, 1e-9)
        milliseconds = (first - began) * 1000
        console.print(f"[dim]{tokens} tokens{cut}, the first after {milliseconds:.0f} ms, then {rate:.0f} tokens/s[/]")
    return text or None
