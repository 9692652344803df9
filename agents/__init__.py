"""Roles, task graphs and task sets, and the messages exchanged with any model.

Nothing here imports torch or vllm, reads a file or opens a connection, except where its name says so.
"""

from .answers.answers import parse_answer
from .backend import Backend, ScriptedBackend
from .errors import (
    AdapterError,
    AnswerError,
    AskRejectedError,
    AssignmentError,
    BaseModelError,
    ChatTemplateError,
    EngineDeadError,
    EngineError,
    GraphError,
    InfeasibleError,
    LimitError,
    LoopLimitError,
    MetierError,
    PluginError,
    ProfileError,
    RecipeError,
    ResumeError,
    RunError,
    RunInterrupted,
    ServerError,
    SessionError,
    SettingsError,
    StepError,
    StepTimeoutError,
    StoreError,
    TaskSetError,
    ToolError,
    TrainingError,
    UnknownVariantError,
    VariantError,
)
from .graphs.drafts import FieldRef, StepRef
from .graphs.graph import TaskGraph
from .graphs.nodes import BuiltGraph
from .graphs.pictures import write_picture
from .messages import Ask, Message, Reply, Usage
from .prompts import PROMPT_LAYOUT, TASK_TEXT_RULE, render_prompt, task_text
from .reasoning_gym_tasks import mix_tasks, reasoning_gym_tasks
from .roles import Role
from .sampling import Sampling, TokenChance, WrittenToken
from .tasksets import Drawn, Split, Task, TaskSet, draw_tasks
from .taught_rows import taught_rows
from .thinking import THINKING_OFF, ThinkingProfile, ThinkingTags
from .tools.calls import ToolCall, ToolCalls
from .tools.mcp_server import McpServer, mcp_tools
from .tools.tool import Tool, tool
from .traffic import TrafficRow, read_traffic, write_traffic
from .turns import Turn

__all__ = [
    "PROMPT_LAYOUT",
    "TASK_TEXT_RULE",
    "THINKING_OFF",
    "AdapterError",
    "AnswerError",
    "Ask",
    "AskRejectedError",
    "AssignmentError",
    "Backend",
    "BaseModelError",
    "BuiltGraph",
    "ChatTemplateError",
    "Drawn",
    "EngineDeadError",
    "EngineError",
    "FieldRef",
    "GraphError",
    "InfeasibleError",
    "LimitError",
    "LoopLimitError",
    "McpServer",
    "Message",
    "MetierError",
    "PluginError",
    "ProfileError",
    "RecipeError",
    "Reply",
    "ResumeError",
    "Role",
    "RunError",
    "RunInterrupted",
    "Sampling",
    "ScriptedBackend",
    "ServerError",
    "SessionError",
    "SettingsError",
    "Split",
    "StepError",
    "StepRef",
    "StepTimeoutError",
    "StoreError",
    "Task",
    "TaskGraph",
    "TaskSet",
    "TaskSetError",
    "ThinkingProfile",
    "ThinkingTags",
    "TokenChance",
    "Tool",
    "ToolCall",
    "ToolCalls",
    "ToolError",
    "TrafficRow",
    "TrainingError",
    "Turn",
    "UnknownVariantError",
    "Usage",
    "VariantError",
    "WrittenToken",
    "draw_tasks",
    "mcp_tools",
    "mix_tasks",
    "parse_answer",
    "read_traffic",
    "reasoning_gym_tasks",
    "render_prompt",
    "task_text",
    "taught_rows",
    "tool",
    "write_picture",
    "write_traffic",
]
