"""Sparsity training and fine-tuning over any number of ranks."""

from netslim.train.evaluate import Evaluation, evaluate
from netslim.train.loop import fit
from netslim.train.models import ModelConfig, build_model, check_model, model_names
from netslim.train.optim import FitConfig, learning_rate, make_optimizer, travel
from netslim.train.ranks import (
    EngineConfig,
    LostRankError,
    Runtime,
    asks_for_cpu,
    check_devices,
    check_values,
    few_images,
    num_gpus,
    weights_digest,
)
from netslim.train.record import Record, RecordConfig
from netslim.train.saved import CheckpointConfig, Preempted, Saver, Snapshot, Store
from netslim.train.sparsity import GammaPenalty, SparsityConfig, describe_pull, gamma_summary, soft_threshold_

__all__ = [
    "CheckpointConfig",
    "EngineConfig",
    "Evaluation",
    "FitConfig",
    "GammaPenalty",
    "LostRankError",
    "ModelConfig",
    "Preempted",
    "Record",
    "RecordConfig",
    "Runtime",
    "Saver",
    "Snapshot",
    "SparsityConfig",
    "Store",
    "asks_for_cpu",
    "build_model",
    "check_devices",
    "check_model",
    "check_values",
    "describe_pull",
    "evaluate",
    "few_images",
    "fit",
    "gamma_summary",
    "learning_rate",
    "make_optimizer",
    "model_names",
    "num_gpus",
    "soft_threshold_",
    "travel",
    "weights_digest",
]
