"""Every name that our spans use, in one file, since OpenTelemetry's GenAI conventions still change.

Follows the conventions of `opentelemetry-semantic-conventions` 0.66b2, whose own module of these names is marked
as incubating and may be moved. What has no name there stands under `metier.`
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "AGENT_NAME",
    "ASK_ATTRIBUTES",
    "CONVERSATION_ID",
    "ERROR_TYPE",
    "OPERATION",
    "OPERATION_ASK",
    "OPERATION_STEP",
    "OPERATION_TOOL",
    "OPERATION_WORKFLOW",
    "PROVIDER",
    "PROVIDER_NAME",
    "REQUEST_MODEL",
    "RESPONSE_MODEL",
    "ROUTE_REASON",
    "RUN_RESUMED",
    "STEP_PATH",
    "SWAP_ADAPTER",
    "SWAP_ENGINE",
    "SWAP_KIND",
    "TOOL_NAME",
    "TOOL_TYPE",
    "WORKFLOW_NAME",
]

OPERATION: Final = "gen_ai.operation.name"
OPERATION_WORKFLOW: Final = "invoke_workflow"
OPERATION_STEP: Final = "invoke_agent"
OPERATION_ASK: Final = "chat"
OPERATION_TOOL: Final = "execute_tool"
PROVIDER: Final = "gen_ai.provider.name"
PROVIDER_NAME: Final = "metier"
WORKFLOW_NAME: Final = "gen_ai.workflow.name"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_TYPE: Final = "gen_ai.tool.type"
AGENT_NAME: Final = "gen_ai.agent.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
ERROR_TYPE: Final = "error.type"

STEP_PATH: Final = "metier.step.path"
RUN_RESUMED: Final = "metier.run.resumed"
ROUTE_REASON: Final = "metier.route.reason"
SWAP_KIND: Final = "metier.swap.kind"
SWAP_ADAPTER: Final = "metier.swap.adapter"
SWAP_ENGINE: Final = "metier.swap.engine"

ASK_ATTRIBUTES: Final = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "thinking_tokens": "gen_ai.usage.reasoning.output_tokens",
    "queue_s": "metier.ask.queue_s",
    "prefill_s": "metier.ask.prefill_s",
    "decode_s": "metier.ask.decode_s",
    "cpu_s": "metier.ask.cpu_s",
    "swaps": "metier.ask.swaps",
    "swap_s": "metier.ask.swap_s",
}
"""Field of an ask's usage → attribute; `output_tokens` are thinking and answer together."""
