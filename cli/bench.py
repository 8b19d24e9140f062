"""`twostroke bench`: puts a load on a running cluster, and measures."""

import json as json_format
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.load.config import Limits, LoadConfig, check
from benchmarks.load.record import Record
from benchmarks.load.report import as_json, as_table, plot
from benchmarks.load.run import DEFAULT_REQUESTS, run
from benchmarks.load.summary import summarize
from cli.options import Connection, errors_as_exit
from twostroke import event_loop


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
        File for the figures and a record of every request.
    plot_file
        File for a plot, such as run.png; needs matplotlib, which twostroke[plot] brings.
    """
    measured = _Measured()
    interrupted = False
    with errors_as_exit():
        try:
            event_loop.run(_measure(connection, load, measured))
        except KeyboardInterrupt:
            if not measured.records:
                print("twostroke: interrupted before a request that counts had ended", file=sys.stderr)
                raise
            interrupted = True
        model, records = measured.model, measured.records
        if not records:
            raise SystemExit("twostroke: no request was due within --duration")
        summary = summarize(records, limits)
        Console().print(as_table(summary))
        if json:
            document = as_json(load, limits, model, records, summary) | {"interrupted": interrupted}
            json.write_text(json_format.dumps(document, indent=1))
        if plot_file:
            plot(records, f"{model}, {_words(load)}", plot_file)
    if interrupted:
        print("twostroke: interrupted; the figures are of the requests that had ended", file=sys.stderr)
        raise SystemExit(130)
    if 2 * sum(summary.errors.values()) > summary.requests:
        raise SystemExit("twostroke: most requests failed")


@dataclass(slots=True)
class _Measured:
    model: str = ""
    records: list[Record] = field(default_factory=list)


async def _measure(connection: Connection, load: LoadConfig, measured: _Measured) -> None:
    """Fills `measured`, which keeps what there is if Ctrl-C ends this."""
    client = connection.async_client(share_call=load.share_call)
    async with client:
        measured.model = (await client.model(timeout=10)).name
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            total = load.requests or (None if load.duration else DEFAULT_REQUESTS)
            task = progress.add_task("requests answered", total=total)

            def note(record: Record) -> None:
                measured.records.append(record)
                progress.advance(task)

            await run(client, load, note)


def _words(load: LoadConfig) -> str:
    arrivals = f"{load.rate:g} requests/s" if load.rate else f"{load.concurrency or 8} at once"
    return f"{arrivals}, prompts {load.prompt_tokens}, answers {load.output_tokens} tokens"
