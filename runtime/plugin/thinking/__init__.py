"""Thinking inside vLLM: budgets to the token, and where the grammar of the answer begins."""
