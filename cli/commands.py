"""The commands of `twostroke`. Each is imported only when it is run, so that help is quick."""

from importlib import import_module

from cyclopts import App, Parameter
from cyclopts.config import Env

from cli.help import HelpFormatter


def _default(value: object) -> str | None:
    """A default as it would be typed; None where help shows none."""
    if value is None or value == ():
        return None
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


app = App(
    name="twostroke",
    help="LLM inference with prefill and decode in separate workers.",
    help_epilogue="Every flag is an environment variable too: --max-batch is TWOSTROKE_MAX_BATCH. Flags win.",
    # The version is read only if asked for, and help is not parsed as markdown: either would make --help twice as slow.
    version=lambda: import_module("importlib.metadata").version("twostroke"),
    help_format="plaintext",
    help_formatter=HelpFormatter(),
    config=Env("TWOSTROKE_", command=False),
    default_parameter=Parameter(negative=(), show_default=_default),
)

app.command(
    "cli.serve:serve",
    name="serve",
    usage="twostroke serve [OPTIONS] [-- COMMAND...]",
    help="""Run a router and workers on this machine, until Ctrl-C.

    A part that dies is started again. A second Ctrl-C does not wait for running requests.

    Settings without a default here have those of the parts: see `twostroke router --help` and its like.

    With a command, wait until the cluster is ready, run the command with TWOSTROKE_TARGET set, then stop the cluster.

    The parts' log lines are then shown only if one of them fails.

        twostroke serve -- twostroke generate "Name three primary colors." --temperature 0
    """,
)
app.command("cli.parts:router", name="router", help="Run a router, which clients call.")
app.command("cli.parts:prefill_worker", name="prefill-worker", help="Run a worker that turns prompts into KV cache.")
app.command("cli.parts:decode_worker", name="decode-worker", help="Run a worker that turns KV cache into tokens.")
app.command(
    "cli.key:key",
    name="key",
    help="""Make an API key, and its lines for the router's keys file.

        twostroke key alice >> keys.toml
    """,
)
app.command(
    "cli.generate:generate",
    name="generate",
    help="""Ask a running cluster one question; the answer appears as it is generated.

        twostroke generate "Name three primary colors." --temperature 0

        git diff | twostroke generate - --system "Write a commit message for this change." --temperature 0
    """,
)
app.command(
    "cli.chat:chat",
    name="chat",
    help="""Talk with the model of a running cluster.

    Ctrl-C cuts an answer short (the part that came stays in the conversation), Ctrl-D ends the program.

    When the context is full, the oldest questions and answers are left out.
    """,
)
app.command(
    "cli.top:top",
    name="top",
    help="""Watch a running cluster: workers, queues, blocks and rates, until Ctrl-C.

    Rates are those of the last interval; hits are the share of prompt tokens found in a worker's cache since its start.
    """,
)
app.command(
    "cli.bench:bench",
    name="bench",
    help="""Measure a running cluster under load: latencies, rates and goodput.

    Ctrl-C ends it, with the figures of the requests that were done. It exits with 1 if more than half of them failed.

        twostroke bench --concurrency 16 --prompt-tokens 512 --output-tokens 128

        twostroke bench --rate 4 --duration 60 --ttft-limit 500 --json run.json
    """,
)
