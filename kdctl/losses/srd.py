"""Simple recipe distillation: a projected embedding, batch normalisation, and the logarithm of a distance."""

from __future__ import annotations

from torch import Tensor, nn

from kdctl.config.types import Positive
from kdctl.losses.adapters import to_vectors
from kdctl.losses.base import DryRun
from kdctl.losses.relations import BatchNorm, RelationLoss

_SMALLEST = 1e-12
_BATCH_NORM_EPS = 1e-4


class SRD(RelationLoss):
    """Logarithm of the distance of normalised embeddings, through a linear projector.

    Formula: 2 log sum_id |s_i,d - t_i,d|^exponent of the batch, where s is the batch-normalised linear projection of
        the student's vectors and t the batch-normalised teacher's vectors (no scale, no shift). The logarithm keeps the
        gradient from vanishing as the two come near.
    Paper: Miles & Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024.
    Published: weight 1 beside ce 1 and kd 1 at T = 1; exponent 4 (the authors' code), 1 by default in torchdistill.
    Taps: the embedding before the classifier; maps and tokens are averaged over their positions.

    exponent: of the difference of each number.
    """

    def __init__(self, *, exponent: Positive = 4.0) -> None:
        super().__init__()
        self.exponent = exponent
        self.projectors = nn.ModuleList()
        self.norms = nn.ModuleList()

    def setup(self, dry_run: DryRun) -> None:
        super().setup(dry_run)
        self.projectors, self.norms = nn.ModuleList(), nn.ModuleList()
        for student, teacher in self.feature_pairs(dry_run.student, dry_run.teacher):
            length = to_vectors(teacher).shape[1]
            projector = nn.Linear(to_vectors(student).shape[1], length)
            mine, target = (BatchNorm(length, _BATCH_NORM_EPS, affine=False) for _ in range(2))
            self.projectors.append(nn.Sequential(projector, mine).to(student.device))
            self.norms.append(target.to(student.device))

    def relation(self, pair: int, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        difference_BD = self.projectors[pair](student_BD) - self.norms[pair](teacher_BD)
        # The floor keeps the logarithm finite where both are equal; the sum of powers itself may leave float32.
        return 2 * (self.exponent * difference_BD.abs().clamp_min(_SMALLEST).log()).logsumexp((0, 1))
