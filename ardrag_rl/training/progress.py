"""A progress bar that shows the reward."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback


class RewardProgress(ProgressCallback):
    """transformers' bar, with the last reward and its terms beside it instead of printed logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows the reward."""
        if self.training_bar is None or not logs or "reward" not in logs:
            return
        shown = {"reward": logs["reward"]}
        shown |= {k.split("/")[1]: v for k, v in logs.items() if k.startswith("rewards/") and k.endswith("/mean")}
        self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})
