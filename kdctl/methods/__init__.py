"""Methods: what owns a training step. The table, as text: name -> (module:Class, summary)."""

METHODS = {
    "distill": ("distill:Distill", "one student, weighted loss terms, with or without a teacher"),
}
