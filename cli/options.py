"""Flags that several commands share."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, TypeVar, cast

from cyclopts import Parameter
from cyclopts.types import PositiveFloat

from common.network.addresses import Targets
from common.security import pem
from common.security.security_config import SettingsError, TlsConfig
from common.security.tls import channel_credentials
from twostroke import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    InvalidArgument,
    Options,
    TwostrokeError,
    Unauthenticated,
)

_Client = TypeVar("_Client", Client, AsyncClient)


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Connection(TlsConfig):
    target: Targets = "localhost:8600"
    """The router, host:port. Or several that take turns: ipv4:10.0.0.1:8600,10.0.0.2:8600, dns:///NAME:8600."""

    api_key: str | None = None
    """Your API key, where the router asks for one. In the environment, other users of the machine don't see it."""

    tls: bool = False
    """Connect with TLS, and trust the system's certificate authorities unless --tls-ca names others."""

    timeout: PositiveFloat | None = None
    """Seconds that an answer may take. Not set: no limit."""

    def client(self) -> Client:
        """
        Raises:
            SettingsError: a file of the TLS settings is missing or wrong, or the API key cannot be sent.
        """
        return self._made(Client)

    def async_client(self, *, share_call: bool = False) -> AsyncClient:
        """Raises as `client`."""
        return self._made(partial(AsyncClient, share_call=share_call))

    def _made(self, make: Callable[..., _Client]) -> _Client:
        try:
            return make(
                self.target,
                api_key=self.api_key,
                tls=channel_credentials(pem.read(self)) or self.tls,
                tls_server_name=self.tls_server_name,
                timeout=self.timeout,
            )
        except InvalidArgument as error:
            field, _, problem = error.message.partition(": ")
            raise SettingsError(f"--{field.replace('_', '-')}: {problem}") from error


def _is_json_object(_type: object, text: str | None) -> None:
    try:
        if text is None or isinstance(json.loads(text), dict):
            return
    except ValueError:
        pass
    raise ValueError('Must be a JSON object, such as {"enable_thinking": false}')


USUAL_TOKENS = 512


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class Sampling:
    max_tokens: int | None = None
    """Most tokens of the answer. Not set: 512, or what the context has room for if that is less."""

    temperature: float | None = None
    """0 is greedy; the router's default is 1."""

    top_k: int | None = None
    """Sample from this many of the likeliest tokens only."""

    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability."""

    min_p: float | None = None
    """Drop tokens that are less likely than this times the likeliest."""

    repetition_penalty: float | None = None
    """Above 1: tokens of the prompt and the answer become less likely."""

    presence_penalty: float | None = None
    """Above 0: tokens of the answer become less likely, once for all their uses."""

    frequency_penalty: float | None = None
    """Above 0: tokens of the answer become less likely with every use."""

    seed: int | None = None
    """The same seed gives the same answer."""

    stop: tuple[str, ...] | None = None
    """Ends the answer before this text; may be given several times."""

    ignore_eos: bool = False
    """Go on past the model's end of the answer."""

    template_variables: Annotated[str | None, Parameter(validator=_is_json_object)] = None
    """JSON object of variables for the model's chat template, such as {"enable_thinking": false}."""

    @property
    def most_tokens(self) -> int:
        return USUAL_TOKENS if self.max_tokens is None else self.max_tokens

    def options(self) -> Options:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        given["max_tokens"] = self.most_tokens
        if self.template_variables is not None:
            given["template_variables"] = json.loads(self.template_variables)
        return cast(Options, given)


def sentence_of(error: TwostrokeError) -> str:
    """How the command line tells of an error."""
    hint = ""
    if isinstance(error, Unauthenticated):
        hint = "; set --api-key or TWOSTROKE_API_KEY"
    elif error.message.endswith("Connection refused"):
        hint = "; start a cluster with `twostroke serve`, or name another router with --target"
    return f"{error.message}{hint}"


@contextmanager
def errors_as_exit(timeout: float | None = None) -> Iterator[None]:
    """Ends the program with a sentence if a call fails or output cannot be written, and quietly after Ctrl-C or if
    nobody reads the output any more. `timeout`: seconds that calls may take, as --timeout says."""
    try:
        yield
        sys.stdout.flush()
    except TwostrokeError as error:
        sentence = sentence_of(error)
        if timeout is not None and isinstance(error, DeadlineExceeded):
            sentence = f"no end within --timeout {timeout:g} s"
        raise SystemExit(f"twostroke: {error.code.name}: {sentence}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(128 + signal.SIGPIPE) from None
    except OSError as error:
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        raise SystemExit(f"twostroke: {where}{error.strerror or error}") from error


def _drop_output() -> None:
    """Keeps Python from trying to write the rest again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
