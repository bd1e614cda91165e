"""What the keys of a run's files are called where people read them."""

METRICS = {
    "response_tokens": "answer length, tokens",
    "truncated": "cut off",
    "kl_nats_per_token": "KL, nats per token",
    "greedy_agreement": "tokens agreed on",
    "length_ratio": "length, times the base's",
    "form": "in the baked form",
    "quoted": "quoted from the context",
    "talk": "talk of a prompt",
}
"""Metrics whose key is no name."""
EXPLAINED = {
    "valid": "could be read in the form asked for",
    "correct": "right, says the grader; or solved, says the game",
    "turns": "of an episode",
    "invalid_moves": "of an episode; replies without a possible action",
    "agreement": "same text as in_context",
    "truncated": "at the token limit",
    "kl_nats_per_token": "KL(base || trained) along the base's answers",
    "greedy_agreement": "what base and the trained model both write",
    "length_ratio": "the trained model's tokens over the base's",
    "form": "answers that look like those to the task",
    "quoted": "five-word runs that stand in the context",
    "talk": "answers that speak of instructions or a prompt",
    "task kl_nats_per_token": "to the teacher, along a model's own answers",
}
"""Metric -> what it says; one suite's own meaning has the suite's name before it."""
SUITES = {
    "task": "The task",
    "kept": "Other prompts under other system messages",
    "spill": "Other prompts without a system message",
    "context_return": "The task, with the context given again",
    "other_context": "A different task, explained in its prompt",
    "leak": "Prompts that ask for the context",
}
"""Suite -> what is asked in it."""
CONDITIONS = {
    "base": "the model as it was, without the context",
    "in_context": "the same with the context in its prompt",
    "off_policy": "classic distillation, trained on the teacher's answers; without the context",
    "baked": "this run, without the context",
}
"""Condition -> which model that is, and what it reads."""


def metric_name(metric: str) -> str:
    """A metric's name, with its unit where the numbers have one."""
    return METRICS.get(metric, metric.replace("_", " "))


def explanation(suite: str, metric: str) -> str:
    """What a metric says in a suite; empty where its name says it."""
    return EXPLAINED.get(f"{suite} {metric}") or EXPLAINED.get(metric, "")
