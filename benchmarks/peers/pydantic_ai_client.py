"""The workflow with pydantic-ai agents: `pydantic_ai_client.py BASE_URL`, orders on stdin."""

from __future__ import annotations

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from workflow import INSTRUCTIONS, SYSTEM, TOKENS_PER_ASK, Batch, model_of, obey, program_of, prompt


async def main(base_url: str) -> None:
    """Run batches until stdin ends."""
    provider = OpenAIProvider(base_url=base_url, api_key="none")
    settings = ModelSettings(max_tokens=TOKENS_PER_ASK, temperature=0, timeout=600)
    agents = {
        role: Agent(OpenAIChatModel(model_of(role), provider=provider), system_prompt=SYSTEM, model_settings=settings)
        for role in INSTRUCTIONS
    }

    async def ask(role: str, batch: Batch, **inputs: str | None) -> str:
        reply = await agents[role].run(prompt(role, inputs))
        usage = reply.usage
        batch.count(usage.input_tokens, usage.output_tokens)
        return reply.output

    await obey(program_of(ask))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
