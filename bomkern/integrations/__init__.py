"""bomkern in other people's loops: `loggers` writes to TensorBoard, Weights & Biases and MLflow, `lightning` has a
callback. Neither imports what it works with before it is asked to."""

from .loggers import Logger, MetricsLogger, TensorBoard, as_logger, log_goals

__all__ = ["Logger", "MetricsLogger", "TensorBoard", "as_logger", "log_goals"]
