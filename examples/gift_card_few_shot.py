"""The workflow of gift_card.py by prompt alone: every role on the base, shown four rows of its teacher.

metier run examples/gift_card_few_shot.py --tasks test:24
"""

from __future__ import annotations

import gift_card
from few_shot import with_examples

from metier.agents import TaskGraph

graph = TaskGraph("gift-card-few-shot", takes=gift_card.Shop, gives=gift_card.Pair)
offer = graph.step(with_examples(gift_card.reader, gift_card.reader_rows))
with graph.loop("attempt", after=offer, max_rounds=3, until=lambda s: s[check].correct):
    find = graph.step(with_examples(gift_card.finder, gift_card.finder_rows))
    check = graph.step(with_examples(gift_card.checker, gift_card.checker_rows), after=find)

tasks = gift_card.tasks
