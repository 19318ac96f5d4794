"""Optimizers and learning-rate schedules. The tables, as text: name -> (module:Class, summary).

Any other class of torch.optim is named as torch names it: `kind: RMSprop`.
"""

OPTIMIZERS = {
    "sgd": ("optimizers:SGD", "stochastic gradient descent with momentum"),
    "adam": ("optimizers:Adam", "Adam (Kingma & Ba, ICLR 2015)"),
    "adamw": ("optimizers:AdamW", "Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019)"),
}

SCHEDULES = {
    "constant": ("schedules:Constant", "the same learning rate throughout"),
    "cosine": ("schedules:Cosine", "half a cosine from the full learning rate to the least"),
    "linear": ("schedules:Linear", "a straight line from the full learning rate to the least"),
    "multistep": ("schedules:MultiStep", "multiplied by gamma at each milestone"),
    "one_cycle": ("schedules:OneCycle", "up and down again along cosines"),
}
