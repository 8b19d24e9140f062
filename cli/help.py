"""How help looks: a paragraph for each flag, and those of TLS and of the cluster's secret after all others."""

from typing import Any

from cyclopts.help import DefaultFormatter, HelpEntry, InlineText


class HelpFormatter(DefaultFormatter):
    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        entries = [_in_one_paragraph(entry) for entry in sorted(panel.entries, key=_is_of_security)]
        super().__call__(console, options, panel.copy(entries=entries))


def _is_of_security(entry: HelpEntry) -> bool:
    """Settings inherit these flags, which would put them first."""
    return any(name.startswith(("--tls", "--cluster-secret")) for name in entry.names)


def _in_one_paragraph(entry: HelpEntry) -> HelpEntry:
    """Without the line ends of the docstring that explains it, which cyclopts would print with its indentation."""
    if isinstance(entry.description, InlineText):
        text: Any = entry.description.primary_renderable
        text.plain = " ".join(text.plain.split())
    return entry
