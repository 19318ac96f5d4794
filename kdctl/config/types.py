"""Types for the arguments of components, free of torch: a class's signature names them, the checker reads them.

They are pydantic annotations: a value outside the range is an error with file and line before anything is built.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
STEPS = r"^[0-9]+ steps$"
When = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=STEPS)]
"""A moment of training: a number of epochs, or `500 steps`."""
Scheduled = Annotated[float, Field(gt=0)] | Annotated[dict[When, Annotated[float, Field(gt=0)]], Field(min_length=1)]
"""A number above 0, or {moment: number}, linear between the moments."""
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PathStr = Annotated[str, Field(min_length=1, json_schema_extra={"path": True})]
"""A path; a relative one is read against the file it stands in."""
Tap = Annotated[str, Field(min_length=1, pattern=r"^[^\s]+$")]
"""A place in a model: `module.path`, `:in` for its input, `#2` for its second call, `.key` into tuples and dicts."""
DEVICE = r"^(auto|cpu|cuda(:[0-9]+)?|mps)$"
"""What can name a device; whether the machine has it shows where it is used."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
