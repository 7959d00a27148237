"""The causal few-step student: block-causal DiT, KV cache, streaming, Online LPM."""
