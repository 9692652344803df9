"""The workflow with the plain OpenAI client: `openai_client.py BASE_URL`, orders on stdin."""

from __future__ import annotations

import asyncio
import sys

from openai import AsyncOpenAI
from workflow import SYSTEM, TOKENS_PER_ASK, Batch, model_of, obey, program_of, prompt


async def main(base_url: str) -> None:
    """Run batches until stdin ends."""
    client = AsyncOpenAI(base_url=base_url, api_key="none", timeout=600)

    async def ask(role: str, batch: Batch, **inputs: str | None) -> str:
        reply = await client.chat.completions.create(
            model=model_of(role),
            messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt(role, inputs)}],
            max_completion_tokens=TOKENS_PER_ASK,
            temperature=0,
        )
        assert reply.usage is not None
        batch.count(reply.usage.prompt_tokens, reply.usage.completion_tokens)
        return reply.choices[0].message.content or ""

    await obey(program_of(ask))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
