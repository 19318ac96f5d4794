"""Teachers: live or stored, one or several. How several are combined, as text: name -> (module:Class, summary)."""

ENSEMBLES = {
    "mean_logits": ("combine:MeanLogits", "one voice: the mean of their logits; features each by themselves"),
    "mean": ("combine:Mean", "each term against each teacher, averaged (AVER)"),
    "weighted": ("combine:Weighted", "each term against each teacher, with given weights"),
    "ebkd": ("combine:Entropy", "teachers weighted sample by sample: the surer, the more (Kwon et al., ICASSP 2020)"),
    "ca_mkd": ("combine:Confidence", "teachers weighted by how well they know the label (Zhang et al., ICASSP 2022)"),
    "aekd": (
        "adaptive:Adaptive",
        "weights for the direction on which gradients agree (Du et al., NeurIPS 2020)",
    ),
    "best": ("combine:Best", "each sample is taught by the teacher that knows it best"),
    "class_groups": ("combine:ClassGroups", "each class is taught by the teacher of its group"),
}
