"""The bidirectional video diffusion transformer that is distilled: flow time, attention, DiT, conditions, codec, sampler."""
