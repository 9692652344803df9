"""The training loop: its loss against a slow oracle, its batches, and that a killed run ends the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.agents import TrafficRow, TrainingError
from metier.specializers.training.batches import EncodedRow, encode_rows, passes, plan_batches, shared_start
from metier.specializers.training.loop import Progress, TrainingSettings, learning_rate_at, train
from metier.specializers.training.objective import Objective, answer_loss

SETTINGS = TrainingSettings(steps=6, batch_rows=4, warmup_steps=2, checkpoint_steps=2, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def encoded(tokenizer: Any, rows: list[TrafficRow]) -> list[EncodedRow]:
    return encode_rows(rows, tokenizer, max_row_tokens=200)


def tuned(tiny_base: Path, dropout: float = 0.0) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=dropout, target_modules=["q_proj", "up_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # peft starts it at zero, which would hide errors
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def weights(model: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_rows_are_encoded_as_an_engine_prompts(tokenizer: Any, rows: list[TrafficRow]) -> None:
    (row,) = encode_rows(rows[:1], tokenizer, max_row_tokens=200)
    text = tokenizer.decode(row.tokens)
    assert text == (
        "<|im_start|>system\nDo your own step.<|im_end|>\n<|im_start|>user\n0 plus 0<|im_end|>\n"
        '<|im_start|>assistant\n{"value":0}<|im_end|>'
    )
    assert tokenizer.decode(row.tokens[row.prompt_tokens :]) == '{"value":0}<|im_end|>'
    with pytest.raises(TrainingError, match=r"row 1 has \d+ tokens.*max_row_tokens=20"):
        encode_rows(rows, tokenizer, max_row_tokens=20)
    with pytest.raises(TrainingError, match="no rows"):
        encode_rows([], tokenizer, max_row_tokens=200)


def test_a_row_without_messages_is_plain_text(tokenizer: Any) -> None:
    text = "The planner writes a plan, the solver solves it."
    (row,) = encode_rows([TrafficRow(role="text", messages=(), reply=text)], tokenizer, max_row_tokens=200)
    assert tokenizer.decode(row.tokens) == text  # no turn begins or ends
    assert row.prompt_tokens == 1
    with pytest.raises(TrainingError, match="row 1 is text of 0 tokens"):
        encode_rows([TrafficRow(role="text", messages=(), reply="")], tokenizer, max_row_tokens=200)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_loss_is_that_of_each_row_alone(tiny_base: Path, encoded: list[EncodedRow], count: int) -> None:
    import torch

    model, batch = tuned(tiny_base), encoded[: 5 * count : 5]
    total, tokens = torch.zeros(()), 0
    for row in batch:  # the oracle: one row, no padding, nothing shared
        logits = model(input_ids=torch.tensor([row.tokens])).logits[0]
        for at in range(row.prompt_tokens, len(row.tokens)):
            total = total - torch.log_softmax(logits[at - 1], dim=-1)[row.tokens[at]]
            tokens += 1
    (total / tokens).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = answer_loss(model, batch, pad_token=0)
    loss.backward()
    assert loss.item() == pytest.approx((total / tokens).item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_the_loss_holds_without_a_shared_start(tiny_base: Path) -> None:
    import torch

    model = tuned(tiny_base)
    rows = [EncodedRow((5, 6, 7, 8), 3), EncodedRow((9, 6, 7, 8, 11), 1)]
    assert shared_start(rows) == 0
    singles = [answer_loss(model, [row], pad_token=0).item() for row in rows]
    loss = answer_loss(model, rows, pad_token=0)
    assert loss.item() == pytest.approx((singles[0] * 1 + singles[1] * 4) / 5, rel=1e-5)
    assert torch.isfinite(loss)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(0, 3)), min_size=1))
def test_the_shared_start_leaves_a_prompt_token_to_every_row(parts: list[tuple[list[int], int]]) -> None:
    rows = [EncodedRow((*prompt, *[9] * answer), len(prompt)) for prompt, answer in parts]
    shared = shared_start(rows)
    assert all(row.tokens[:shared] == rows[0].tokens[:shared] for row in rows)
    assert all(shared < row.prompt_tokens for row in rows)


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=120),
    st.integers(1, 16),
    st.integers(1, 30),
    st.integers(0, 5),
)
def test_batches_are_full_repeatable_and_fair(lengths: list[int], batch_rows: int, steps: int, seed: int) -> None:
    plan = plan_batches(lengths, batch_rows=batch_rows, steps=steps, seed=seed)
    size = min(batch_rows, len(lengths))
    assert len(plan) == steps
    assert all(len(set(batch)) == size for batch in plan)
    assert plan == plan_batches(lengths, batch_rows=batch_rows, steps=steps, seed=seed)
    longer = plan_batches(lengths, batch_rows=batch_rows, steps=steps + 5, seed=seed)
    assert longer[:steps] == plan
    epoch = plan[: len(lengths) // size]
    seen = [row for batch in epoch for row in batch]
    assert len(seen) == len(set(seen))


def test_batches_hold_rows_of_like_length() -> None:
    lengths = [10 + (i * 37) % 100 for i in range(256)]
    plan = plan_batches(lengths, batch_rows=16, steps=16, seed=0)
    padded = sum(16 * max(lengths[i] for i in batch) for batch in plan)
    assert padded < 1.1 * sum(lengths)


def test_a_batch_in_passes_has_the_loss_and_the_gradients_of_the_whole(
    tiny_base: Path, encoded: list[EncodedRow]
) -> None:
    model = tuned(tiny_base)
    found = {}
    for pass_tokens in (None, 100, 1):
        model.zero_grad()
        objective = Objective(model, pad_token=0)
        objective.pass_tokens = pass_tokens
        loss = objective.add_answer_gradients(encoded[:7], weight=0.5)
        found[pass_tokens] = loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    whole, gradients = found[None]
    for pass_tokens in (100, 1):
        loss, parts = found[pass_tokens]
        assert loss == pytest.approx(whole, rel=1e-5)
        for name, gradient in gradients.items():
            assert parts[name] == pytest.approx(gradient, rel=1e-3, abs=1e-6), name


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 100))
def test_passes_keep_every_row_in_order_within_the_limit(lengths: list[int], pass_tokens: int) -> None:
    rows = [EncodedRow(tuple(range(length)), 0) for length in lengths]
    parts = passes(rows, pass_tokens)
    assert [row for part in parts for row in part] == rows and all(parts)
    assert all(len(part) == 1 or sum(len(row.tokens) for row in part) <= pass_tokens for part in parts)
    # No part could have taken the first row of the next.
    for part, after in zip(parts, parts[1:], strict=False):
        assert sum(len(row.tokens) for row in [*part, after[0]]) > pass_tokens
    assert passes(rows, None) == [rows]


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    for schedule in ("cosine", "linear"):
        settings = TrainingSettings(steps=100, learning_rate=1.0, warmup_steps=10, schedule=schedule)
        rates = [learning_rate_at(step, settings) for step in range(100)]
        assert rates[0] == pytest.approx(1 / 11)
        assert max(rates) == rates[10] == 1.0
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.02
    assert learning_rate_at(0, TrainingSettings(steps=1, learning_rate=1.0)) == 1.0


class KilledError(Exception):
    pass


def run(
    model: Any,
    encoded: list[EncodedRow],
    folder: Path,
    *,
    stop_after: int = 0,
    settings: TrainingSettings = SETTINGS,
    job: str = "job",
    seed: int = 0,
) -> list[dict[str, float]]:
    def stop(progress: Progress) -> None:
        if progress.step == stop_after:
            raise KilledError

    return train(
        model,
        encoded,
        settings,
        seed=seed,
        pad_token=0,
        checkpoint=folder / "checkpoint.safetensors",
        job=job,
        on_progress=stop,
    )


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5, 6])
def test_a_stopped_run_goes_on_to_the_same_weights(
    tmp_path: Path, tiny_base: Path, encoded: list[EncodedRow], stop_after: int
) -> None:
    import torch

    whole = tuned(tiny_base, dropout=0.3)  # dropout, so that random states matter too
    log = run(whole, encoded, tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tuned(tiny_base, dropout=0.3), encoded, tmp_path / "cut", stop_after=stop_after)
    resumed = tuned(tiny_base, dropout=0.3)
    assert run(resumed, encoded, tmp_path / "cut") == log
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name


def test_training_lowers_the_loss_and_the_seed_decides(
    tmp_path: Path, tiny_base: Path, encoded: list[EncodedRow]
) -> None:
    settings = SETTINGS.model_copy(update={"steps": 30, "learning_rate": 1e-2})
    log = run(tuned(tiny_base), encoded, tmp_path / "a", settings=settings)
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert [entry["step"] for entry in log] == list(range(1, 31))
    assert run(tuned(tiny_base), encoded, tmp_path / "b", settings=settings) == log
    assert run(tuned(tiny_base), encoded, tmp_path / "c", settings=settings, seed=1) != log


def test_a_run_that_diverges_keeps_the_checkpoint_before(
    tmp_path: Path, tiny_base: Path, encoded: list[EncodedRow]
) -> None:
    import torch

    model = tuned(tiny_base)

    def poison(progress: Progress) -> None:
        if progress.step == 5:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(TrainingError, match=r"step 6 of 6: loss nan.*Lower learning_rate"):
        train(model, encoded, SETTINGS, seed=0, pad_token=0, checkpoint=path, job="job", on_progress=poison)
    log = run(tuned(tiny_base), encoded, tmp_path)  # from step 4 on, sound
    assert len(log) == 6
    assert all(math.isfinite(entry["loss"]) for entry in log)


def test_a_checkpoint_of_another_job_or_a_damaged_one_is_refused(
    tmp_path: Path, tiny_base: Path, encoded: list[EncodedRow]
) -> None:
    run(tuned(tiny_base), encoded, tmp_path)
    with pytest.raises(TrainingError, match=r"belongs to another job.*Delete"):
        run(tuned(tiny_base), encoded, tmp_path, job="other")
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=r"cannot be read.*Delete"):
        run(tuned(tiny_base), encoded, tmp_path)
