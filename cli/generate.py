"""`twostroke generate`: one question, one answer."""

import re
import sys
from io import TextIOWrapper
from json import dumps
from typing import Annotated

from cyclopts import Parameter
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cli.guide import Guide, is_one
from cli.options import Connection, Sampling, errors_as_exit
from cli.room import room_for_answer
from twostroke import Client, Finish, Generation, InvalidArgument, Messages, Options, Prompt, TwostrokeError

FLAG = re.compile(r"--?[A-Za-z][\w-]*(=\S*)?")


def _is_no_flag(_type: object, prompt: str) -> None:
    if FLAG.fullmatch(prompt):
        raise ValueError("There is no such flag; a prompt like it goes through standard input, with -")


def generate(
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True, show_env_var=False, validator=_is_no_flag)],
    /,
    *,
    system: str | None = None,
    raw: bool = False,
    json: bool = False,
    guide: Annotated[Guide, Parameter(name="*", validator=is_one)] = Guide(),
    connection: Connection = Connection(),
    sampling: Sampling = Sampling(),
) -> None:
    """
    Parameters
    ----------
    prompt
        What to ask; - reads standard input.
    system
        A system message to put before it.
    raw
        Continue the prompt as it stands, without the model's chat template.
    json
        Print one JSON object at the end: text, token ids, finish reason, usage and timing.
    """
    text = _read_standard_input() if prompt == "-" else prompt
    if not (text if raw else text.strip()):
        raise _refused("there is nothing to ask: the prompt is empty")
    question: str | Messages = text if raw else _chat(text, system)
    options = sampling.options()
    if raw:
        options.pop("template_variables", None)  # the environment may have them, for the chats
    options.update(guide.options())
    with errors_as_exit(connection.timeout), connection.client() as client:
        answer = _print_json if json else _print_as_it_comes
        limit = "--max-tokens is the limit"
        try:
            finish = answer(client, question, options)
        except InvalidArgument:
            if (left := room_for_answer(client, question, sampling)) is None:
                raise
            options["max_tokens"] = left
            limit = "the context has room for no more"
            finish = answer(client, question, options)
    if finish and finish.reason == "length" and not (raw or json):
        print(f"twostroke: cut off after {finish.usage.completion_tokens} tokens; {limit}", file=sys.stderr)


def _read_standard_input() -> str:
    try:
        return TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
    except UnicodeDecodeError:
        raise _refused("standard input is not UTF-8") from None


def _refused(sentence: str) -> SystemExit:
    """Ends the program like a wrong flag does."""
    print(f"twostroke: {sentence}", file=sys.stderr)
    return SystemExit(2)


def _print_json(client: Client, question: Prompt, options: Options) -> Finish:
    answer = client.generate(question, **options)
    print(_as_json(answer))
    return answer.finish


def _print_as_it_comes(client: Client, question: Prompt, options: Options) -> Finish | None:
    finish, end = None, "\n"
    try:
        for piece in client.stream(question, **options):
            print(piece.text, end="", flush=True)
            end = piece.text[-1:] or end
            finish = piece.finish
    except TwostrokeError:
        if end != "\n":
            print(flush=True)  # so that the error starts on a new line
        raise
    print()
    return finish


def _chat(question: str, system: str | None) -> Messages:
    messages = [{"role": "user", "content": question}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _as_json(answer: Generation) -> str:
    def plain(message: Message) -> object:
        return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)

    return dumps(
        {
            "text": answer.text,
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish.reason,
            "prompt": plain(answer.prompt),
            "usage": plain(answer.finish.usage),
            "timing": plain(answer.finish.timing),
        },
        ensure_ascii=False,
    )
