"""Adapters inside vLLM: LoRA on the CPU, T-REX's gate, LoRA over quantised weights."""
