"""The workflow of ledger.py by prompt alone: every role on the base, shown four rows of its teacher.

metier run examples/ledger_few_shot.py --tasks test:24
"""

from __future__ import annotations

import ledger
from few_shot import with_examples

from metier.agents import TaskGraph

graph = TaskGraph("ledger-few-shot", takes=ledger.Ledger, gives=ledger.Total)
with graph.loop("attempt", max_rounds=3, until=lambda s: s[audit].correct):
    read = graph.step(with_examples(ledger.reader, ledger.reader_rows))
    add = graph.step(with_examples(ledger.accountant, ledger.accountant_rows), after=read)
    audit = graph.step(with_examples(ledger.auditor, ledger.auditor_rows), after=add)

tasks = ledger.tasks
