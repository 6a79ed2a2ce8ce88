"""Scores of a trained model on the tasks of the papers: perplexity, commonsense, MMLU, HumanEval and GLUE."""
