"""The bidirectional video diffusion transformer that is distilled: DiT, conditions, codec, guidance, samplers."""
