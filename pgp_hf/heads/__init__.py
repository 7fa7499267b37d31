"""What turns features into class scores: masks, class statistics, and classifiers in closed form."""

from .base import keep_classes
from .statistics import ClassStatistics

__all__ = ["ClassStatistics", "keep_classes"]
