"""How a model does on held-out pairs, tasks and texts, before and after steering."""

from grains_ext.evaluation.comparison import EvaluationReport, Measurement, evaluate, measure
from grains_ext.evaluation.intervals import Estimate, PairedChange, Proportion, Statistic
from grains_ext.evaluation.multiple_choice import MultipleChoice
from grains_ext.evaluation.questions import Answered, Question, QuestionSet, win_rate, wins

__all__ = [
    "Answered",
    "Estimate",
    "EvaluationReport",
    "Measurement",
    "MultipleChoice",
    "PairedChange",
    "Proportion",
    "Question",
    "QuestionSet",
    "Statistic",
    "evaluate",
    "measure",
    "win_rate",
    "wins",
]
