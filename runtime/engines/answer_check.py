"""The self-check of an engine on new weights before it may serve."""

from __future__ import annotations

from collections.abc import Sequence

from ...agents.errors import EngineError
from ...agents.messages import Ask, Message
from ...agents.thinking import THINKING_OFF
from ...specializers.checkpoints.self_check import KnownAnswer
from .engine import Engine, EngineRequest

__all__ = ["check_answers"]

ROLE = "self-check"
"""The role that the check's CPU seconds are charged to."""

_REMEDY = (
    "The kernel for its number of bits does not compute what the checkpoint says on this machine: use another scheme, "
    "or report it with the output of `metier doctor`."
)
_REMEDY_OF_OLD_CARD = (
    "Its card is of metier 0.1 and knows first words only: make the variant again with this version, whose check is "
    "finer. If that is refused too, use another scheme."
)


async def check_answers(engine: Engine, known: Sequence[KnownAnswer]) -> None:
    """Ask for the first token after each prompt of `known` and compare its log-probability; most have to be right.

    Some may be wrong where numbers of few bits tip something; an engine that loaded its weights wrongly gets hardly
    any right.
    Raises: EngineError, with the engine closed.
    """
    wrong: list[tuple[float, KnownAnswer, str]] = []
    try:
        for number, answer in enumerate(known):
            messages = (Message(role="user", content=answer.prompt),)
            thinking = THINKING_OFF if answer.thinking_off else None
            ask = Ask(
                run_id=ROLE,
                step_path=f"{number}",
                role=ROLE,
                messages=messages,
                max_tokens=1,
                thinking=thinking,
                confidence=True,
            )
            reply = await engine.generate(EngineRequest(ask))
            engine.write_off(ROLE, reply.usage.cpu_s)
            distance = answer.distance(reply.text, reply.mean_logprob)
            if distance > answer.limit:
                wrong.append((distance, answer, reply.text))
        if 2 * len(wrong) > len(known):
            distance, answer, text = max(wrong, key=lambda found: found[0])
            raise EngineError(
                f"engine {engine.name!r} answers {len(wrong)} of {len(known)} known prompts wrongly: "
                f"{answer.prompt!r} with {text!r}, {distance:.2f} nats from what its weights say",
                expected=f"{answer.first[0][0]!r}, or another within {answer.limit:.2f} nats",
                remedy=_REMEDY_OF_OLD_CARD if answer.words_only else _REMEDY,
            )
    except BaseException:
        await engine.close()
        raise
