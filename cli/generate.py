"""`twostroke generate`: one question, one answer."""

import re
import sys
from json import dumps, loads
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cli.options import Connection, Sampling, errors_as_exit
from cli.room import room_for_answer
from twostroke import Client, Finish, Generation, InvalidArgument, Messages, Options, Prompt

FLAG = re.compile(r"--?[A-Za-z][\w-]*(=\S*)?")


def _is_no_flag(_type: object, prompt: str) -> None:
    if FLAG.fullmatch(prompt):
        raise ValueError("There is no such flag; a prompt like it goes through standard input, with -")


def _is_schema(_type: object, file: Path | None) -> None:
    try:
        if file is None or isinstance(loads(file.read_text(encoding="utf-8")), dict):
            return
    except (OSError, ValueError):
        pass
    raise ValueError("Must name a file that holds a JSON schema")


def generate(
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True, show_env_var=False, validator=_is_no_flag)],
    /,
    *,
    system: str | None = None,
    raw: bool = False,
    json: bool = False,
    json_schema: Annotated[Path | None, Parameter(validator=_is_schema)] = None,
    regex: str | None = None,
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
        Continue the prompt as it is, without the model's chat template.
    json
        Print one JSON object at the end: text, token ids, finish reason, usage and timing.
    json_schema
        A file with a JSON schema that the answer follows.
    regex
        A regular expression that the whole answer matches.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    question: str | Messages = text if raw else _chat(text, system)
    options = sampling.options()
    if raw:
        options.pop("template_variables", None)  # the environment may have them, for the chats
    if json_schema is not None:
        options["json_schema"] = json_schema.read_text(encoding="utf-8")
    if regex is not None:
        options["regex"] = regex
    with errors_as_exit(), connection.client() as client:
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


def _print_json(client: Client, question: Prompt, options: Options) -> Finish:
    answer = client.generate(question, **options)
    print(_as_json(answer))
    return answer.finish


def _print_as_it_comes(client: Client, question: Prompt, options: Options) -> Finish | None:
    finish = None
    for piece in client.stream(question, **options):
        print(piece.text, end="", flush=True)
        finish = piece.finish
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
