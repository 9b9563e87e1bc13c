"""A progress bar that shows what a run is worth and where its time goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback


class RewardProgress(ProgressCallback):
    """transformers' bar, with the last update beside it instead of printed logs: reward and its terms, KL to the policy
    that acted and to the reference, ratio before the update, videos per second, and seconds of rollout and learner."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows the update."""
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix_str(progress_line(logs))


def progress_line(logs: Mapping[str, float]) -> str:
    """What the bar shows of an update's logs."""
    parts = [f"reward {logs['reward']:.3f}"]
    parts += [f"{k.split('/')[1]} {v:.3f}" for k, v in logs.items() if k.startswith("rewards/") and k.endswith("/mean")]
    parts += [f"{name} {logs[key]:.1e}" for name, key in (("kl", "approx_kl"), ("kl_ref", "kl")) if key in logs]
    if "before_update/ratio" in logs:
        parts.append(f"ratio {logs['before_update/ratio']:.5f}")
    if "videos_per_second" in logs:
        parts.append(f"{logs['videos_per_second']:.2f} videos/s")
    seconds = {"policy": "seconds/policy", "env": "seconds/env", "micro-batch": "seconds/micro_batch"}
    split = [f"{name} {logs[key]:.1f}" for name, key in seconds.items() if key in logs]
    return ", ".join(parts) + (f" [s: {' '.join(split)}]" if split else "")
