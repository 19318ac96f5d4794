"""Where else the numbers of a run go, beside its own files: a table, one file a service, imported when it is named."""

LOGGERS = {
    "tensorboard": ("tensorboard:TensorBoard", "event files in the run directory, for `tensorboard --logdir runs`"),
    "wandb": ("wandb:WandB", "Weights & Biases; without a login, or with --offline, kept here until `wandb sync`"),
    "mlflow": ("mlflow:MLflow", "an MLflow store in the run directory, or the server of MLFLOW_TRACKING_URI"),
}
