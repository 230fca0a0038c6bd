"""A tuned model beside the pre-trained one: text, questions and tasks, with intervals."""

from .evaluate import evaluate
from .intervals import Estimate, Paired
from .page import write_report
from .results import Evaluation, QuestionResult, TextResult

__all__ = ["Estimate", "Evaluation", "Paired", "QuestionResult", "TextResult", "evaluate", "write_report"]
