"""Known first answers: near what the model computes, far from what another computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from metier.agents.chat.chat_tokens import chat_tokens
from metier.specializers.checkpoints.self_check import PROMPTS, KnownAnswer, make_self_check, read_self_check
from tests.tiny_families import FAMILIES_THAT_DIFFER, write_tiny_family


def answers(folder: Path, noise: float = 0.0) -> list[tuple[str, float]]:
    """The first token of each greedy answer and its log-probability, by the whole model.

    `noise` on its logits is relative to their spread.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    found = []
    for prompt in PROMPTS:
        ids = chat_tokens(tokenizer, [{"role": "user", "content": prompt}])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        logprobs = (logits + noise * logits.std() * torch.randn(logits.shape, generator=generator)).log_softmax(-1)
        token = int(logprobs.argmax())
        found.append((tokenizer.decode([token], skip_special_tokens=True), float(logprobs[token])))
    return found


@pytest.mark.parametrize("name", FAMILIES_THAT_DIFFER)
def test_a_model_that_is_sure_of_nothing_is_told_from_another(tmp_path: Path, name: str) -> None:
    # Random models with a tied head all repeat the last token of the prompt.
    base, other = (
        write_tiny_family(tmp_path / f"{seed}", name, seed=seed, tie_word_embeddings=False) for seed in (0, 9)
    )
    known = read_self_check({"self_check": make_self_check(base)})
    assert [answer.prompt for answer in known] == list(PROMPTS)

    def wrong(found: list[tuple[str, float]]) -> int:
        return sum(k.distance(*answer) > k.limit for k, answer in zip(known, found, strict=True))

    right = answers(base)
    assert wrong(right) == 0 and max(k.distance(*a) for k, a in zip(known, right, strict=True)) < 1e-3
    assert wrong(answers(base, noise=0.02)) <= 1  # as numbers of 16 bits have it
    assert 2 * wrong(answers(other)) > len(PROMPTS)


def test_the_distance_of_answers() -> None:
    known = KnownAnswer(prompt="", first=((" Paris", -1.0), ("", -2.0), ("Lyon", -2.4), ("", -6.0)))
    assert known.distance("Paris", -1.1) == pytest.approx(0.1)
    assert known.distance("Lyon", -2.3) == pytest.approx(0.7)  # the model likes it 1.4 nats less than Paris
    assert known.distance("\ufffd", -5.9) == pytest.approx(2.5)  # parts of letters have no name of their own
    assert known.distance("Rome", -1.0) == pytest.approx(5.0)
    assert known.distance("Paris", None) == 0
    assert known.limit == 0.6
    assert KnownAnswer(prompt="", first=(("a", -5.0), ("b", -5.4))).limit == pytest.approx(0.1)
    assert KnownAnswer(prompt="", first=(("a", -5.0), ("b", -5.01))).limit == 0.05
    assert read_self_check({}) == ()


def test_cards_of_metier_0_1_are_checked_by_the_word_they_know() -> None:
    (known,) = read_self_check({"self_check": [{"prompt": "Which city?", "begins": " Paris"}]})
    assert known.prompt == "Which city?"
    for logprob in (None, -0.01, -1.5):
        assert known.distance("Paris", logprob) == 0
        assert known.distance("Rome", logprob) > known.limit and known.distance("", logprob) > known.limit


def test_a_model_that_thinks_is_known_with_thinking_closed(tmp_path: Path) -> None:
    """Else all its answers would begin with the same tag."""
    base = write_tiny_family(tmp_path, "qwen3")
    usual = read_self_check({"self_check": make_self_check(base)})
    template = base / "chat_template.jinja"
    opens = "{% if add_generation_prompt %}<think>\n{% endif %}"
    template.write_text(template.read_text(encoding="utf-8") + opens, encoding="utf-8")
    known = read_self_check({"self_check": make_self_check(base)})
    assert {answer.thinking_off for answer in known} == {True} and {answer.thinking_off for answer in usual} == {False}
    assert [answer.first for answer in known] != [answer.first for answer in usual]
