"""Tasks: what is learnt, and how it is measured. The table, as text: name -> (module:Class, summary)."""

TASKS = {
    "classification": ("classification:Classification", "one of C classes a sample: cross entropy, top-1"),
}

ALIASES = {"text_classification": "classification"}
