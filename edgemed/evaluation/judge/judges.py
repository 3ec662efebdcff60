"""Who judges: an OpenAI-compatible endpoint (the `judge` extra), or a GGUF through our own engine.

    judge = EndpointJudge("gpt-4", base_url=None)         # key from OPENAI_API_KEY, address from OPENAI_BASE_URL, as that client does
    reply = judge.ask(messages)                           # Reply, or EndpointError

One reply a call, temperature 0. What may pass (a full queue, a lost connection, an answer of 5xx) is tried again with growing pauses by
the client; what remains is an EndpointError. What one question alone causes (too long, refused) is a Reply without text that says why.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from edgemed.core.conversation import Turn
from edgemed.core.errors import ContextOverflowError, EndpointError, InputError, MissingExtraError
from edgemed.evaluation.judge.protocol import Message

if TYPE_CHECKING:
    from runtimes.engine import Engine

TIMEOUT_S = 120.0
RETRIES = 8
_RESUME = "What was judged so far is kept: run the same command again."


@dataclass(frozen=True)
class Reply:
    """A judge's words. Token counts are None where the endpoint does not tell; `failure` says why there are no words."""

    text: str
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    failure: str = ""


class Judge(Protocol):
    """`asks_again`: whether the same question may get another reply, so that a useless one is worth a second try."""

    name: str
    asks_again: bool

    def ask(self, messages: Sequence[Message]) -> Reply:
        """One reply. Raises EndpointError or EngineError where no further question can be asked."""


class EndpointJudge:
    """An OpenAI-compatible server. Safe for several threads."""

    asks_again = True

    def __init__(self, model: str, base_url: str | None, retries: int = RETRIES, timeout_s: float = TIMEOUT_S) -> None:
        """Raises MissingExtraError, InputError for a key or an address that is missing."""
        try:
            import openai
        except ModuleNotFoundError as error:
            raise MissingExtraError.of("Asking an endpoint", "judge") from error
        self.name = model
        self._openai = openai
        # A server of one's own rarely wants a key, but the client insists on one.
        key = os.environ.get("OPENAI_API_KEY") or ("none" if base_url or os.environ.get("OPENAI_BASE_URL") else None)
        if key is None:
            raise InputError(
                "Expected a key in OPENAI_API_KEY or an address with --endpoint, found neither.",
                "Set the variable, name a server, or judge offline with --gguf FILE.",
            )
        self._client = openai.OpenAI(api_key=key, base_url=base_url, max_retries=retries, timeout=timeout_s)
        self.address = str(self._client.base_url)

    def ask(self, messages: Sequence[Message]) -> Reply:
        """One reply. Raises EndpointError."""
        openai = self._openai
        try:
            said: Any = list(messages)
            completion = self._client.chat.completions.create(model=self.name, messages=said, temperature=0.0)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Reply("", failure=f"the endpoint refused this question ({_first_line(error)})")
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise EndpointError(f"{self.address} does not accept the key ({_first_line(error)}).", "Check OPENAI_API_KEY.") from error
        except openai.NotFoundError as error:
            raise EndpointError(
                f"Expected a model '{self.name}' at {self.address}, found none ({_first_line(error)}).", "Check --judge and --endpoint."
            ) from error
        except openai.OpenAIError as error:
            raise EndpointError(f"{self.address} gives no answer ({_first_line(error)}).", _RESUME) from error
        except ValueError as error:  # a body that is not the JSON which its header promises
            return Reply("", failure=f"the endpoint's answer could not be read ({_first_line(error)})")
        return _read(completion)


def _read(completion: Any) -> Reply:
    """Servers differ: text where JSON belongs, no choices, no content, no usage."""
    choices = getattr(completion, "choices", None)
    message = getattr(choices[0], "message", None) if choices else None
    if message is None:
        return Reply("", failure="the endpoint's answer holds no message")
    usage = getattr(completion, "usage", None)
    text = getattr(message, "content", None)
    return Reply(
        text.strip() if isinstance(text, str) else "",
        prompt_tokens=getattr(usage, "prompt_tokens", None),
        new_tokens=getattr(usage, "completion_tokens", None),
    )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class EngineJudge:
    """A language model in our own engine: offline, greedy, the same reply each time."""

    asks_again = False

    def __init__(self, engine: Engine, name: str, max_tokens: int) -> None:
        self.name, self._engine, self._max_tokens = name, engine, max_tokens

    def ask(self, messages: Sequence[Message]) -> Reply:
        """One reply. The system message is in the engine's template already (runtimes/textmodel.py). Raises EngineError."""
        try:
            answer = self._engine.ask((Turn("user", messages[-1]["content"]),), max_tokens=self._max_tokens)
        except ContextOverflowError as error:
            return Reply("", failure=f"the question is too long for the judge ({error.message})")
        return Reply(answer.text.strip(), answer.usage.prompt_tokens, answer.usage.new_tokens)
