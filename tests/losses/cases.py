"""How each loss of the table is set up on random signals, where the usual way does not do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

NOT_FIXED = float("nan")


@dataclass(frozen=True)
class Case:
    """A loss on random signals.

    student, teacher: the shapes of a sample's feature at each tap, for the checks of gradients and of hard inputs;
    equal: shapes that are the same on both sides, for the value at the teacher and for micro-batches.
    at_teacher: the value where student and teacher are the same; NOT_FIXED where there is none.
    arguments: of the loss. positive: whether features are never negative (after a ReLU).
    constant: what of the student ("logits" or a tap) the loss itself learns from, and so holds constant in part, and
    which of its parameters gets another gradient on purpose: finite differences by it are no gradient.
    """

    student: list[tuple[int, ...]] = field(default_factory=lambda: [(2, 4, 4)])
    teacher: list[tuple[int, ...]] = field(default_factory=lambda: [(3, 2, 2)])
    equal: list[tuple[int, ...]] = field(default_factory=lambda: [(3, 4, 4)])
    at_teacher: float = 0.0
    arguments: dict[str, Any] = field(default_factory=dict)
    positive: bool = False
    constant: tuple[str, ...] = ()


MAPS = Case()
LEVELS = Case(student=[(2, 4, 4), (3, 2, 2)], teacher=[(3, 4, 4), (4, 2, 2)], equal=[(3, 4, 4), (4, 2, 2)])
VECTORS = Case(student=[(5,)], teacher=[(7,)], equal=[(6,)])
EXITS: list[tuple[int, ...]] = [(2, 4, 4), (6,)]
TOKENS = Case(student=[(4, 3)], teacher=[(4, 5)], equal=[(4, 5)])

CASES: dict[str, Case] = {
    "supervised": Case(at_teacher=NOT_FIXED),
    "tf_reg": Case(at_teacher=NOT_FIXED),
    "byot": Case(student=EXITS, teacher=EXITS, equal=EXITS, at_teacher=NOT_FIXED, constant=("logits", "g")),
    "uskd": Case(at_teacher=NOT_FIXED, constant=("logits",)),
    "nkd": Case(at_teacher=NOT_FIXED),
    "forward_kl": Case(at_teacher=NOT_FIXED),
    "skewed_forward_kl": Case(at_teacher=NOT_FIXED),
    "dist": Case(at_teacher=NOT_FIXED),
    "wsld": Case(at_teacher=NOT_FIXED, constant=("logits",)),
    "ctkd": Case(constant=("theta",)),
    "top_k_kl": Case(arguments={"k": 2}),
    "ttm": Case(at_teacher=NOT_FIXED),
    "wttm": Case(at_teacher=NOT_FIXED),
    "wkd_logit": replace(VECTORS, at_teacher=NOT_FIXED),
    "fitnet": Case(at_teacher=NOT_FIXED),
    "vid": Case(at_teacher=NOT_FIXED),
    "ab": replace(LEVELS, at_teacher=NOT_FIXED),
    "factor_transfer": Case(arguments={"paraphraser": False}),
    "ofd": Case(at_teacher=NOT_FIXED),
    "fsp": LEVELS,
    "kdsvd": LEVELS,
    "hierarchical_context": LEVELS,
    "reviewkd": replace(LEVELS, at_teacher=NOT_FIXED),
    "srrl": replace(VECTORS, at_teacher=NOT_FIXED),
    "semckd": Case(
        student=[(2, 4, 4), (3, 2, 2)],
        teacher=[(1, 4, 4), (2, 2, 2)],
        equal=[(3, 4, 4), (4, 2, 2)],
        at_teacher=NOT_FIXED,
        arguments={"embed_dim": 2},
    ),
    "cat_kd": Case(student=[(3, 4, 4)]),
    "mgd": Case(at_teacher=NOT_FIXED),
    "rkd": VECTORS,
    "correlation_congruence": replace(VECTORS, at_teacher=NOT_FIXED, arguments={"embed_dim": 4}),
    "pkt": VECTORS,
    "crd": replace(VECTORS, at_teacher=NOT_FIXED, arguments={"bank": "batch", "feature_dim": 4}),
    "srd": replace(VECTORS, at_teacher=NOT_FIXED),
    "hidden_mse": TOKENS,
    "cosine": TOKENS,
    "attention_mse": Case(student=[(2, 4, 4)], teacher=[(2, 4, 4)], equal=[(2, 4, 4)]),
    "attention_kl": Case(student=[(2, 4, 4)], teacher=[(2, 4, 4)], equal=[(2, 4, 4)]),
    "token_relations": Case(student=[(4, 4)], teacher=[(4, 6)], equal=[(4, 6)], arguments={"heads": 2}),
    "pkd": TOKENS,
    "text_nst": Case(student=[(4, 3), (4, 3)], teacher=[(4, 5), (4, 5)], equal=[(4, 5), (4, 5)]),
    "text_fsp": Case(student=[(4, 3), (4, 2)], teacher=[(4, 5), (4, 5)], equal=[(4, 5), (4, 5)]),
}


def case(kind: str) -> Case:
    """The case of a loss; one that is not named above compares one pair of maps, or logits alone."""
    return CASES.get(kind, MAPS)
