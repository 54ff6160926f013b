"""Kinds of numbers that options take."""

import argparse
import math

__all__ = ["fraction", "non_negative", "positive", "positive_float"]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"should be at least 1, got {value}")
    return value


def non_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"should not be negative, got {value}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"should be above 0, got {text}")
    return value


def fraction(text: str) -> float:
    """From 0 up to, but not, 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"should be from 0 to below 1, got {text}")
    return value
