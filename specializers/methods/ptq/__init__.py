"""Post-training quantisation: to the nearest, or by GPTQ."""
