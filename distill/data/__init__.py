"""Data: the puppet world, real speech, and the preparation of both into latent records on disk."""
