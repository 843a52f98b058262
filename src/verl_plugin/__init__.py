"""The same hybrid reward on verl's distributed trainer; see docs/scale-out.md.

verl imports `compute_score` and `HybridReward` from here by name.
"""

from src.verl_plugin.plugin import HybridReward, compute_score

__all__ = ["HybridReward", "compute_score"]
