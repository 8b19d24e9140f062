"""`twostroke bench`: a load against a running cluster."""

import asyncio
import json as json_format
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress

from benchmarks.load.config import Limits, LoadConfig, check
from benchmarks.load.record import Record
from benchmarks.load.report import as_json, as_table, plot
from benchmarks.load.run import DEFAULT_REQUESTS, run
from benchmarks.load.summary import summarize
from cli.options import Connection, errors_as_exit


def _is_in_a_folder(_type: object, path: Path | None) -> None:
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent}")


def _can_be_drawn(_type: object, path: Path | None) -> None:
    _is_in_a_folder(_type, path)
    if path is not None and find_spec("matplotlib") is None:
        raise ValueError("It needs matplotlib: pip install 'twostroke[plot]'")


def bench(
    *,
    load: Annotated[LoadConfig, Parameter(name="*", validator=lambda _, load: check(load))] = LoadConfig(),
    limits: Annotated[Limits, Parameter(name="*")] = Limits(),
    json: Annotated[Path | None, Parameter(validator=_is_in_a_folder)] = None,
    plot_file: Annotated[Path | None, Parameter(name="plot", validator=_can_be_drawn)] = None,
    connection: Connection = Connection(),
) -> None:
    """
    Parameters
    ----------
    json
        File for the figures and every request's record.
    plot_file
        File for a plot, such as run.png; needs matplotlib, which twostroke[plot] brings.
    """
    with errors_as_exit():
        model, records = asyncio.run(_measure(connection, load))
    summary = summarize(records, limits)
    Console().print(as_table(summary))
    if json:
        json.write_text(json_format.dumps(as_json(load, limits, model, records, summary), indent=1))
    if plot_file:
        plot(records, f"{model}, {_words(load)}", plot_file)


async def _measure(connection: Connection, load: LoadConfig) -> tuple[str, list[Record]]:
    client = connection.async_client()
    async with client:
        model = await client.model(timeout=10)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            total = load.requests or (None if load.duration else DEFAULT_REQUESTS)
            task = progress.add_task("requests answered", total=total)
            return model.name, await run(client, load, lambda record: progress.advance(task))


def _words(load: LoadConfig) -> str:
    arrivals = f"{load.rate:g} requests/s" if load.rate else f"{load.concurrency or 8} at once"
    return f"{arrivals}, prompts {load.prompt_tokens}, answers {load.output_tokens} tokens"
