"""The engine: data, roles, rollouts, trainer, checkpoints and the command line."""
