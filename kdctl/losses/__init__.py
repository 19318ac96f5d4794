"""Losses: the terms of a training loss. The table, as text: name -> (module:Class, summary)."""

LOSSES = {
    # supervised
    "supervised": ("supervised:Supervised", "the task's own loss on labelled samples (cross entropy for classes)"),
    # response: the teacher's logits
    "kd": ("kd:KD", "KL divergence of softened probabilities (Hinton et al., 2014), optionally of standardised logits"),
    "logit_mse": ("logit_mse:LogitMSE", "squared distance of logits (Ba & Caruana, NeurIPS 2014)"),
    # feature: what the models hold at their taps
    "fitnet": ("fitnet:FitNet", "squared distance of features through a regressor (Romero et al., ICLR 2015)"),
    "attention_transfer": (
        "attention_transfer:AttentionTransfer",
        "squared distance of normalised spatial attention maps (Zagoruyko & Komodakis, ICLR 2017)",
    ),
    "normalized_l1": ("normalized_l1:NormalizedL1", "L1 distance of features scaled to length one"),
}

ALIASES = {"ce": "supervised", "at": "attention_transfer", "mse": "logit_mse", "hint": "fitnet"}
