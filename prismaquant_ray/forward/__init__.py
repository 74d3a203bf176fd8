"""Weights to codes: scale search, GPTQ, acceptance."""
