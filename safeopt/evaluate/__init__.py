"""What is left afterwards: safety, skill, and how far the weights have moved."""

from safeopt.evaluate.ablation import ablated
from safeopt.evaluate.agreement import agreement
from safeopt.evaluate.answers_file import read_answers, records_of, verdicts_in, write_answers
from safeopt.evaluate.basin import basin
from safeopt.evaluate.directions import across, difference_direction, random_direction
from safeopt.evaluate.drift import drift
from safeopt.evaluate.generate import answers
from safeopt.evaluate.judges import Judge, PhraseJudge, Verdicts, judged
from safeopt.evaluate.judges_margin import MarginJudge, refusal_margin
from safeopt.evaluate.judges_models import ClassifierJudge, GuardJudge
from safeopt.evaluate.length import effective_length
from safeopt.evaluate.lm_eval_task import export_task
from safeopt.evaluate.proportion import Proportion
from safeopt.evaluate.refusal import (
    PHRASES,
    PHRASES_VERSION,
    RefusalReport,
    is_refusal,
    phrases_hash,
    refusal_rate,
)
from safeopt.evaluate.stability import stability
from safeopt.evaluate.utility import accuracy, perplexity

__all__ = [
    "PHRASES",
    "PHRASES_VERSION",
    "ClassifierJudge",
    "GuardJudge",
    "Judge",
    "MarginJudge",
    "PhraseJudge",
    "Proportion",
    "RefusalReport",
    "Verdicts",
    "ablated",
    "accuracy",
    "across",
    "agreement",
    "answers",
    "basin",
    "difference_direction",
    "drift",
    "effective_length",
    "export_task",
    "is_refusal",
    "judged",
    "perplexity",
    "phrases_hash",
    "random_direction",
    "read_answers",
    "records_of",
    "refusal_margin",
    "refusal_rate",
    "stability",
    "verdicts_in",
    "write_answers",
]
