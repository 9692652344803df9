"""Chat templates of model families, as those families write them, on small tokenizers that know their marks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["TEMPLATES", "Family", "tokenizer_of"]


@dataclass(frozen=True)
class Family:
    """A family's special tokens, those it added without making them special, its end of a text, and its template."""

    special: tuple[str, ...]
    added: tuple[str, ...]
    eos: str
    template: str


_ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
_QWEN3_ANSWER = """\
{%- set content = m.content %}{%- set reasoning = '' %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.last or reasoning %}
{{- '<|im_start|>' + m.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}"""
_QWEN3 = (
    "{%- for m in messages %}{%- if m.role in ('user', 'system') %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}" + _QWEN3_ANSWER + "{%- endif %}{%- endfor %}{# <tool_call> </tool_call> #}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}%s{%- endif %}"
)
_CHATML_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_DEEPSEEK_MARKS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
_DEEPSEEK = (
    "{% set ns = namespace(system='') %}{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}<｜begin▁of▁sentence｜>{{ ns.system }}"
    "{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{%- elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + "
    "'<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}%s{% endif %}"
)

TEMPLATES = {
    "chatml": Family(
        _CHATML_MARKS,
        (),
        "<|im_end|>",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    # A text ends elsewhere than a turn.
    "chatml_base": Family(
        _CHATML_MARKS,
        (),
        "<|endoftext|>",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ),
    "llama3": Family(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        (),
        "<|end_of_text|>",
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    # No system role, and turns alternate.
    "gemma2": Family(
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        ("\n\n", "<h1>"),
        "<eos>",
        "<bos>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}" + _ALTERNATE + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    # Puts the system's text into the first user turn by itself.
    "gemma3": Family(
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        (),
        "<eos>",
        "<bos>{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
        "{%- set turns = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}"
        "{%- for m in turns -%}" + _ALTERNATE + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ (first if loop.first else '') + m.content | trim }}<end_of_turn>\n{%- endfor -%}"
        "{%- if add_generation_prompt -%}<start_of_turn>model\n{%- endif -%}",
    ),
    "mistral": Family(
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
        (),
        "</s>",
        "<s>{% for m in messages %}" + _ALTERNATE + "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    ),
    "phi3": Family(
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        (),
        "<|endoftext|>",
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
    ),
    # Its first release: the system's text is left out without a word.
    "phi3_first": Family(
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        (),
        "<|endoftext|>",
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}<|end|>\n<|assistant|>\n"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}",
    ),
    # Thinks by itself unless a closed block is written for it, which has a blank line of its own.
    "qwen3": Family(
        _CHATML_MARKS,
        _QWEN_ADDED,
        "<|im_end|>",
        _QWEN3.replace(
            "%s",
            "{%- if enable_thinking is defined and enable_thinking is false %}"
            "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
        ),
    ),
    # Writes the closed block unless it is told to think.
    "qwen3.5": Family(
        _CHATML_MARKS,
        _QWEN_ADDED,
        "<|im_end|>",
        _QWEN3.replace(
            "%s",
            "{%- if enable_thinking is defined and enable_thinking is true %}{{- '<think>\\n' }}"
            "{%- else %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
        ),
    ),
    # Opens thinking, always.
    "qwq": Family(_CHATML_MARKS, _QWEN_ADDED, "<|im_end|>", _QWEN3.replace("%s", "{{- '<think>\\n' }}")),
    # The same without a line break; the tags are no tokens of their own. Only the last system's text is kept.
    "deepseek_r1": Family(_DEEPSEEK_MARKS, (), "<｜end▁of▁sentence｜>", _DEEPSEEK.replace("%s", "{{ '<think>' }}")),
    # A closed block is the end tag alone.
    "deepseek_v3.1": Family(
        _DEEPSEEK_MARKS,
        ("<think>", "</think>"),
        "<｜end▁of▁sentence｜>",
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
        + _DEEPSEEK.replace("%s", "{{ '<think>' if thinking else '</think>' }}"),
    ),
    # The system's turn says how to think.
    "smollm3": Family(
        _CHATML_MARKS,
        (),
        "<|im_end|>",
        "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}"
        "{{- '<|im_start|>system\n## Metadata\nReasoning Mode: ' + ('/think' if enable_thinking else '/no_think') }}"
        "{%- if messages[0].role == 'system' %}{{- '\n\n' + messages[0].content }}{%- endif %}{{- '<|im_end|>\n' }}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{%- if not enable_thinking %}"
        "{{- '<think>\n\n</think>\n' }}{%- endif %}{{- m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if not enable_thinking %}{{- '<think>\n\n</think>\n' }}{%- endif %}{%- endif %}",
    ),
    # The tags are special tokens.
    "magistral": Family(
        ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
        (),
        "</s>",
        "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        "{# Draft in [THINK] and [/THINK]. #}",
    ),
    # Thoughts and answers are messages in channels of their own; the system's text is a developer's.
    "gpt_oss": Family(
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        (),
        "<|return|>",
        "{{- '<|start|>system<|message|>You are ChatGPT.\n\nReasoning: ' + reasoning_effort|default('medium') }}"
        "{{- '\n\n# Valid channels: analysis, commentary, final.<|end|>' }}{%- for m in messages %}"
        "{%- if m.role == 'system' %}{{- '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}"
        "{%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- else %}"
        "{%- if m.thinking and loop.last and not add_generation_prompt %}"
        '{{- "<|start|>assistant<|channel|>analysis<|message|>" + m.thinking + "<|end|>" }}{%- endif %}'
        "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
    ),
    # A channel too, closed unless thinking is asked for, which a mark in the system's turn does.
    "gemma4": Family(
        ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
        (),
        "<turn|>",
        "<bos>{%- if enable_thinking is defined and enable_thinking or messages[0].role == 'system' %}"
        "{{- '<|turn>system\n' }}{%- if enable_thinking is defined and enable_thinking %}{{- '<|think|>\n' }}"
        "{%- endif %}{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- endif %}"
        "{{- '<turn|>\n' }}{%- endif %}{%- for m in messages %}{%- if m.role != 'system' %}"
        "{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<turn|>\n' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|turn>model\n' }}"
        "{%- if not enable_thinking | default(false) %}{{- '<|channel>thought\n<channel|>' }}{%- endif %}{%- endif %}",
    ),
    # Words of the language, which the system's turn asks for.
    "granite3.2": Family(
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        (),
        "<|end_of_text|>",
        "{%- if messages[0].role == 'system' %}{%- set said = messages[0].content %}{%- else %}"
        "{%- set said = 'You are Granite, developed by IBM.' %}{%- endif %}{%- if thinking %}{%- set said = said + "
        "\" Write your thoughts after 'Here is my thought process:' and write your response after "
        "'Here is my response:' for each user query.\" %}{%- endif %}"
        "{{- '<|start_of_role|>system<|end_of_role|>' + said + '<|end_of_text|>\n' }}"
        "{%- for m in messages %}{%- if m.role != 'system' %}"
        "{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}",
    ),
}
"""Name → family. Each stands for a kind of template."""


def tokenizer_of(name: str, *, normalise: bool = False) -> Any:
    """A tokenizer of bytes with a family's marks and its template; they are looked for in NFKC if `normalise`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    family = TEMPLATES[name]
    vocab = {piece: id for id, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalise:
        backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=normalise) for text in family.special])
    backend.add_tokens([AddedToken(text, special=False, normalized=normalise) for text in family.added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=family.eos)
    tokenizer.chat_template = family.template
    return tokenizer
