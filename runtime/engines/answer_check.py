"""The self-check of an engine on new weights before it may serve."""

from __future__ import annotations

from collections.abc import Sequence

from ...agents.errors import EngineError
from ...agents.messages import Ask, Message
from .engine import Engine, EngineRequest

__all__ = ["check_answers"]

ROLE = "self-check"
"""The role that the check's CPU seconds are charged to."""


async def check_answers(engine: Engine, known: Sequence[tuple[str, str]]) -> None:
    """Ask for the first token after each prompt of `known` and compare; most have to be right.

    One may be wrong where numbers of few bits tip a near tie; an engine that loaded its weights wrongly gets none
    right.
    Raises: EngineError, with the engine closed.
    """
    wrong: list[tuple[str, str, str]] = []
    try:
        for number, (prompt, begins) in enumerate(known):
            messages = (Message(role="user", content=prompt),)
            ask = Ask(run_id=ROLE, step_path=f"{number}", role=ROLE, messages=messages, max_tokens=1)
            reply = await engine.generate(EngineRequest(ask))
            engine.write_off(ROLE, reply.usage.cpu_s)
            if reply.text.strip() != begins.strip():
                wrong.append((prompt, begins, reply.text))
        if 2 * len(wrong) > len(known):
            prompt, begins, text = wrong[0]
            raise EngineError(
                f"engine {engine.name!r} answers {len(wrong)} of {len(known)} known prompts wrongly: "
                f"{prompt!r} with {text!r}",
                expected=f"{begins!r}, which its weights are sure of",
                remedy="The kernel for its number of bits does not compute what the checkpoint says on this machine: "
                "use another scheme, or report it with the output of `metier doctor`.",
            )
    except BaseException:
        await engine.close()
        raise
