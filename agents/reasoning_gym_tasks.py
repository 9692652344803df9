"""Task sets from reasoning-gym: seeded puzzles with verifiers, no network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel

from .errors import TaskSetError, did_you_mean
from .tasksets import SEEDS_PER_SET, Split, Task, TaskSet, seed_range, split_of

__all__ = ["mix_tasks", "reasoning_gym_tasks"]


def reasoning_gym_tasks(
    dataset: str,
    *,
    split: Split,
    size: int,
    input_type: type[BaseModel],
    seed: int = 0,
    answer_field: str | None = None,
    content: Callable[[Mapping[str, Any]], str] | None = None,
    keep: Callable[[Mapping[str, Any]], bool] | None = None,
    **knobs: Any,
) -> TaskSet:
    """Draw `size` different puzzles of one split from a reasoning-gym dataset, scored by its own verifier.

    Splits are disjoint twice: each draws from a seed range of its own, and keeps only questions whose content
    hash falls in it (about 80/10/10), so no test question is ever trained on. `seed` (0 to 999) picks another
    part of the split's seed range. `content` gives the text of an entry that decides its split, by default the
    question: give the core of the puzzle when several datasets word the same one differently. `keep` may turn
    entries down, such as those whose answer a generator gets wrong.

    `input_type` is a model with one text field. The final output may be text, a number, or a model, read at
    `answer_field` (by default its last field: workings come before results). A task is solved (1.0) when the
    verifier gives full marks, else 0.0; an answer it cannot read scores 0. `knobs` go to the dataset. Each
    task's `key` is the generator's entry, metadata included.

    Raises: TaskSetError when reasoning-gym is absent, the dataset or a knob is unknown, `input_type` does not
    fit, or the generator runs out of different questions.
    """
    field = _text_field(input_type)
    first, limit = seed_range(dataset, split, size, seed)
    gym = _create(dataset, first, knobs)
    tasks: list[Task] = []
    seen: set[str] = set()
    drawn = 0
    while len(tasks) < size and drawn < limit:
        entry = gym[drawn]
        drawn += 1
        text = str(entry["question"]).strip()
        if text in seen or split_of(content(entry) if content else text) != split:
            continue
        if keep is not None and not keep(entry):
            continue
        seen.add(text)
        tasks.append(Task(id=f"{dataset}-{first + drawn - 1}", input=input_type(**{field: text}), key=entry))
    if len(tasks) < size:
        raise TaskSetError(
            f"{dataset!r} has only {len(tasks)} different questions in split {split!r} with {knobs}",
            expected=f"{size}",
            remedy="Ask for fewer, or widen the dataset's knobs.",
        )
    return TaskSet(
        name=dataset,
        split=split,
        tasks=tuple(tasks),
        scorer=_scorer(gym, answer_field),
        seeds=(first, first + drawn),
    )


def mix_tasks(name: str, *sets: TaskSet) -> TaskSet:
    """Interleave task sets of one split; each task keeps the scorer of the set it came from.

    Raises: TaskSetError when the sets are of different splits, or two tasks share an id.
    """
    splits = sorted({s.split for s in sets})
    if len(splits) != 1:
        raise TaskSetError(
            f"{name!r} mixes the splits {splits}",
            expected="task sets of one split",
            remedy="Draw all of them with the same `split`.",
        )
    longest = max(len(s) for s in sets)
    tasks = tuple(s.tasks[i] for i in range(longest) for s in sets if i < len(s))
    source = {task.id: s for s in sets for task in s}
    return TaskSet(
        name=name,
        split=sets[0].split,
        tasks=tasks,
        scorer=lambda task, output: source[task.id].scorer(task, output),
        seeds=(min(s.seeds[0] for s in sets), max(s.seeds[1] for s in sets)),
    )


def _text_field(input_type: type[BaseModel]) -> str:
    fields = input_type.model_fields
    names = [name for name, field in fields.items() if field.annotation is str]
    if len(names) != 1 or any(f.is_required() for name, f in fields.items() if name != names[0]):
        raise TaskSetError(
            f"{input_type.__name__} has the fields {', '.join(fields) or 'none'}",
            expected="one text field to hold the question",
            remedy="Declare it as `class Puzzle(BaseModel): text: str`.",
        )
    return names[0]


def _create(dataset: str, first_seed: int, knobs: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            # A dependency of reasoning-gym has invalid escapes in its docstrings.
            warnings.simplefilter("ignore")
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise TaskSetError(
            f"the puzzles of {dataset!r} come from reasoning-gym, which is not installed",
            expected="the `eval` extra",
            remedy="pip install 'metier[eval]'",
        ) from error
    if dataset not in DATASETS:
        raise TaskSetError(
            f"reasoning-gym has no dataset {dataset!r}",
            expected=f"one of its {len(DATASETS)} datasets",
            remedy=did_you_mean(dataset, DATASETS, "See its gallery.", most=3),
        )
    try:
        return reasoning_gym.create_dataset(dataset, seed=first_seed, size=SEEDS_PER_SET, **knobs)
    except (TypeError, ValueError, AssertionError) as error:
        raise TaskSetError(
            f"reasoning-gym refuses {dataset!r} with {knobs}: {error}",
            expected="the dataset's own knobs, within their ranges",
            remedy="Correct the knob.",
        ) from error


def _scorer(gym: Any, answer_field: str | None) -> Callable[[Task, Any], float]:
    def score(task: Task, output: Any) -> float:
        try:
            # Some verifiers raise on junk, and some give partial marks to it.
            return 1.0 if float(gym.score_answer(_answer_text(output, answer_field), task.key)) >= 1.0 else 0.0
        except Exception:
            return 0.0

    return score


def _answer_text(output: Any, answer_field: str | None) -> str:
    if isinstance(output, BaseModel):
        output = getattr(output, answer_field or list(type(output).model_fields)[-1])
    return str(output).strip()
