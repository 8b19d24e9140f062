"""`twostroke top`: a live view of a running cluster."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Never

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.options import Connection, errors_as_exit, sentence_of
from cli.readiness import ROLES, problems_of
from twostroke import Client, TwostrokeError
from twostroke.v1 import inference_pb2 as pb

BAR_CELLS = 24
UNLIMITED = 10_000


@dataclass(frozen=True, slots=True)
class Sample:
    at: float
    load: pb.GetLoadResponse


def top(
    *,
    interval: Annotated[float, Parameter(validator=Number(gte=0.1))] = 1.0,
    once: bool = False,
    connection: Connection = Connection(),
) -> None:
    """
    Parameters
    ----------
    interval
        Seconds between updates.
    once
        Print one frame after one interval, and end.
    """
    console = Console()
    with errors_as_exit(), connection.client() as client:
        if once:
            before = _sample(client)
            time.sleep(interval)
            console.print(frame(before, _sample(client), console))
            return
        with suppress(KeyboardInterrupt):
            if not console.is_terminal or console.is_dumb_terminal:  # on which nothing can be replaced
                _watch(client, interval, console, console.print)
            with Live(Text("no word from the router yet"), console=console, screen=True, auto_refresh=False) as live:
                _watch(client, interval, console, partial(live.update, refresh=True))


def _watch(client: Client, interval: float, console: Console, show: Callable[[RenderableType], None]) -> Never:
    """Goes on while the router is away, so that one can see it come back."""
    before: Sample | None = None
    while True:
        try:
            now = _sample(client)
            show(frame(before or now, now, console))
            before = now
        except TwostrokeError as error:
            show(Text(f"{error.code.name}: {sentence_of(error)}", style="red"))
            before = None
        time.sleep(interval)


def _sample(client: Client) -> Sample:
    load = client.load(timeout=5)
    return Sample(time.monotonic(), load)


# ---------------------------------------------------------------- one frame


def frame(before: Sample, now: Sample, console: Console) -> RenderableType:
    """The cluster at `now`, with rates since `before`. On a narrow console, blocks come below the table. Problems come
    first, because the end is cut off if the screen is too small."""
    wide = _frame(before, now, blocks_beside=True)
    wanted = console.measure(wide, options=console.options.update(width=UNLIMITED)).maximum
    shown = wide if wanted <= console.width else _frame(before, now, blocks_beside=False)
    problems = [Text(problem, style="yellow") for problem in problems_of(now.load)]
    return Group(*problems, Text(), shown) if problems else shown


def _frame(before: Sample, now: Sample, *, blocks_beside: bool) -> RenderableType:
    seconds = now.at - before.at
    known = {worker.instance: worker.totals for worker in before.load.workers}
    table = Table(box=None, pad_edge=False, padding=(0, 1) if blocks_beside else (0, 1, 0, 0))
    below = Table("worker", "blocks", box=None, pad_edge=False)
    for heading in ("role", "worker", "state"):
        table.add_column(heading, no_wrap=True)
    for heading in ("waiting", "running", "leases", "in tok/s", "out tok/s", "hits"):
        table.add_column(heading, justify="right")
    if blocks_beside:
        table.add_column("blocks")
    tokens_in = tokens_out = 0.0
    for worker in sorted(now.load.workers, key=lambda worker: (worker.role, worker.address)):
        totals = worker.totals
        since = known.get(worker.instance, totals)
        taken = _rate(totals.prompt_tokens - since.prompt_tokens, seconds)
        made = _rate(totals.output_tokens - since.output_tokens, seconds)
        tokens_out += made
        tokens_in += _rate(totals.prefilled_tokens - since.prefilled_tokens, seconds)
        table.add_row(
            ROLES.get(worker.role, "?"),
            worker.address,
            Text("ready", style="green") if worker.ready else Text("draining", style="yellow"),
            f"{worker.waiting:,}",
            f"{worker.running:,}",
            f"{worker.leases:,}" if worker.role == pb.WORKER_ROLE_PREFILL else "",
            f"{taken:,.0f}",
            f"{made:,.0f}",
            f"{totals.cached_tokens / totals.prompt_tokens:.0%}" if totals.prompt_tokens else "",
            *([_blocks(worker)] if blocks_beside else []),
        )
        below.add_row(worker.address, _blocks(worker))
    answered = _rate(max(now.load.answered - before.load.answered, 0), seconds)  # a router that restarted counts anew
    summary = (
        f"{now.load.queued:,} queued, {now.load.running:,} running; {answered:,.1f} requests/s, "
        f"{tokens_in:,.0f} tokens/s in, {tokens_out:,.0f} out"
    )
    tables = [table] if blocks_beside else [table, Text(), below]
    return Group(Text(summary, style="bold"), Text(), *tables, Text(), LEGEND)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


# How blocks are shown, in the order of the bar: style and sign of each state. Signs tell them apart without colours.
STATES = (("in_use", "cyan", "█"), ("reserved", "magenta", "▓"), ("cached", "blue", "▒"), ("free", "bright_black", "░"))
LEGEND = Text(" / ").join(Text(f"{sign} {state.replace('_', ' ')}", style=style) for state, style, sign in STATES)


def _blocks(worker: pb.WorkerLoad) -> Text:
    """A bar, and the numbers in its order; and how many are cached in host memory, where there is a place for that.
    Reserved blocks are promised but not taken: the bar shows them in place of free ones and, if those are too few, of
    cached ones."""
    blocks, in_host_memory = worker.blocks, worker.host_blocks
    reserved_free = min(blocks.reserved, blocks.free)
    reserved_cached = min(blocks.reserved - reserved_free, blocks.cached)
    counts = {
        "in_use": blocks.in_use,
        "reserved": reserved_free + reserved_cached,
        "cached": blocks.cached - reserved_cached,
        "free": blocks.free - reserved_free,
    }
    bar = Text()
    shown = end = 0
    for state, style, sign in STATES:
        end += counts[state]
        cells = round(BAR_CELLS * end / blocks.total) - shown if blocks.total else 0
        bar.append(sign * cells, style)
        shown += cells
    bar.append(" " + "/".join(f"{getattr(blocks, state):,}" for state, _, _ in STATES))
    if in_host_memory.total:
        bar.append(f" + {in_host_memory.cached:,}/{in_host_memory.total:,} in host memory")
    return bar
