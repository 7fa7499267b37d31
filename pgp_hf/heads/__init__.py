"""Turn features into class scores: masks of classes, class statistics, and classifiers in closed form."""

from .base import keep_classes
from .statistics import ClassStatistics

__all__ = ["ClassStatistics", "keep_classes"]
