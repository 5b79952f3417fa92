"""Integrations: `loggers` writes to TensorBoard, Weights & Biases and MLflow; the trainers' modules have callbacks.

None imports the other package before it is used.
"""

from .loggers import Logger, MetricsLogger, TensorBoard, as_logger, log_goals

__all__ = ["Logger", "MetricsLogger", "TensorBoard", "as_logger", "log_goals"]
