"""Every name that our spans use, in one file, since OpenTelemetry's GenAI conventions still change.

Beside them stand the names of OpenInference (`openinference-semantic-conventions` 0.1.42), which Phoenix and others
read.

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
    "INPUT_MESSAGES",
    "INPUT_VALUE",
    "KIND",
    "KIND_ASK",
    "KIND_STEP",
    "KIND_TOOL",
    "KIND_WORKFLOW",
    "MESSAGE_CONTENT",
    "MESSAGE_ROLE",
    "MODEL_NAME",
    "NODE_ID",
    "OI_AGENT_NAME",
    "OI_TOOL_NAME",
    "OPERATION",
    "OPERATION_ASK",
    "OPERATION_STEP",
    "OPERATION_TOOL",
    "OPERATION_WORKFLOW",
    "OUTPUT_MESSAGES",
    "OUTPUT_VALUE",
    "PROVIDER",
    "PROVIDER_NAME",
    "REQUEST_MODEL",
    "RESPONSE_MODEL",
    "ROUTE_REASON",
    "RUN_RESUMED",
    "SESSION_ID",
    "STEP_PATH",
    "SWAP_ADAPTER",
    "SWAP_ENGINE",
    "SWAP_KIND",
    "TOKEN_COUNTS",
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

KIND: Final = "openinference.span.kind"
KIND_WORKFLOW: Final = "CHAIN"
KIND_STEP: Final = "AGENT"
KIND_ASK: Final = "LLM"
KIND_TOOL: Final = "TOOL"
SESSION_ID: Final = "session.id"
OI_AGENT_NAME: Final = "agent.name"
OI_TOOL_NAME: Final = "tool.name"
NODE_ID: Final = "graph.node.id"
MODEL_NAME: Final = "llm.model_name"
INPUT_VALUE: Final = "input.value"
OUTPUT_VALUE: Final = "output.value"
INPUT_MESSAGES: Final = "llm.input_messages"
OUTPUT_MESSAGES: Final = "llm.output_messages"
MESSAGE_ROLE: Final = "message.role"
MESSAGE_CONTENT: Final = "message.content"

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

TOKEN_COUNTS: Final = {
    "prompt_tokens": "llm.token_count.prompt",
    "cached_tokens": "llm.token_count.prompt_details.cache_read",
    "output_tokens": "llm.token_count.completion",
    "thinking_tokens": "llm.token_count.completion_details.reasoning",
    "total_tokens": "llm.token_count.total",
}
"""The same counts by their names in OpenInference."""
