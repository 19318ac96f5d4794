"""Methods: what owns a training step. The table, as text: name -> (module:Class, summary)."""

METHODS = {
    "distill": ("distill:Distill", "one student, weighted loss terms, with or without a teacher"),
    "mutual": ("mutual:Mutual", "peers that teach each other (Zhang et al., CVPR 2018)"),
    "one": ("one:ONE", "branches of one net, taught by their gated ensemble (Lan et al., NeurIPS 2018)"),
    "self_distill": ("self_distill:SelfDistill", "the student is taught by its own past: an average or the last epoch"),
    "simkd": ("simkd:SimKD", "the student's features under the teacher's classifier (Chen et al., CVPR 2022)"),
    "data_free": ("data_free:DataFree", "images are synthesised from the teacher: no data needed"),
    "few_sample": ("few_sample:FewSample", "layers aligned by least squares on a few samples (Li et al., CVPR 2020)"),
    "qat": ("qat:QAT", "weights and inputs rounded in training, steps learned (Esser et al., ICLR 2020)"),
    "sparse": ("sparse:Sparse", "more and more weights become zero and stay zero (Zhu & Gupta, 2018)"),
    "on_policy": ("on_policy:OnPolicy", "language models learn on texts that the student writes (GKD, ICLR 2024)"),
    "dot": ("dot:DOT", "a momentum of its own for the teacher's gradient (Zhao et al., ICCV 2023)"),
}

ALIASES = {"dml": "mutual", "gkd": "on_policy", "fskd": "few_sample"}
