"""Evaluation: what a model says of tasks, its scores, and how they compare with baselines."""

from t5jax.evaluation.evaluator import Evaluator, Result, mean_loss
from t5jax.evaluation.run import check_evaluation, evaluate_model

__all__ = ["Evaluator", "Result", "check_evaluation", "evaluate_model", "mean_loss"]
