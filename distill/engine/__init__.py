"""The one package that knows how training is spread: one process, DDP, FSDP2, DeepSpeed ZeRO. See docs/SCALING.md."""

from __future__ import annotations

from distill.engine.config import EngineConfig, load_engine
from distill.engine.pieces import Piece, Pieces
from distill.engine.plain import Engine

__all__ = ["Engine", "EngineConfig", "Piece", "Pieces", "load_engine", "make_engine"]


def make_engine(precision: str, config: EngineConfig) -> Engine:
    """The engine that `config` names; the modules of the others are not imported."""
    if config.kind == "plain":
        return Engine(precision, config)
    if config.kind == "ddp":
        from distill.engine.replicated import Replicated

        return Replicated(precision, config)
    if config.kind == "fsdp2":
        from distill.engine.fsdp import FSDP2

        return FSDP2(precision, config)
    from distill.engine.zero import ZeRO

    return ZeRO(precision, config)
