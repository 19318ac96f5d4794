"""Tasks: what is learnt, and how it is measured. The table, as text: name -> (module:Class, summary)."""

TASKS = {
    "classification": ("classification:Classification", "one of C classes a sample: cross entropy, top-1"),
    "multilabel": ("multilabel:Multilabel", "any number of C classes a sample: binary cross entropy, mAP"),
    "regression": ("regression:Regression", "a number a sample: squared error, Spearman's correlation"),
    "token_classification": ("tokens:TokenClassification", "one of C classes a word: cross entropy, top-1"),
    "causal_lm": ("tokens:CausalLM", "the token after each: cross entropy, perplexity"),
    "sentence_embedding": ("embedding:SentenceEmbedding", "a vector a text, as the teacher has it: nearest neighbours"),
    "masked_lm": ("tokens:MaskedLM", "tokens that are hidden: cross entropy, perplexity"),
}

ALIASES = {"text_classification": "classification"}
